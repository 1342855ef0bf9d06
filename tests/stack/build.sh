#!/usr/bin/env bash
# Builds the servers that the stack tests run, from their sources by Go's module proxy.
#
#   bash tests/stack/build.sh          build what is missing; say where everything is
#   bash tests/stack/build.sh --list   only say what there is, one "NAME<TAB>PATH" a line
#
# Names of servers after that mean only these.
#
# A server of the right version on PATH is used as it is. What is built is kept in
# PERISCOPE_STACK_CACHE (periscope-otel/stack in the user's cache directory), in a folder named
# after its version and a hash of everything it is made from. All four take about 13 minutes on two
# cores, 4 GB of Go's module cache and 4 GB of its build cache; versions and checksums are pinned by
# the go.mod and go.sum files in builds/.
#
# Exit codes: 0 all are there; 69 some are missing and there is no Go to build them; 1 a build failed.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cache="${PERISCOPE_STACK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/periscope-otel/stack}"
COLLECTOR=0.159.0
JAEGER=2.0.0-rc2 # module v1.62.0
PROMETHEUS=3.15.0 # module v0.315.0
TOXIPROXY=2.12.0

# name, folder in builds/, version, oldest version that collector-config/ works with
servers="
otelcol           collector   $COLLECTOR   0.152
jaeger            jaeger      $JAEGER      2.0
prometheus        prometheus  $PROMETHEUS  3.11
promtool          prometheus  $PROMETHEUS  3.11
toxiproxy-server  toxiproxy   $TOXIPROXY   2.5
"

main() {
    local name folder version oldest path missing=() builds=true
    if [ "${1:-}" = --list ]; then
        builds=false
        shift
    fi
    while read -r name folder version oldest; do
        [ -n "$name" ] || continue
        [ "$#" -eq 0 ] || [[ " $* " = *" $name "* ]] || continue
        path="$(find_server "$name" "$folder" "$version" "$oldest")"
        if [ -z "$path" ] && "$builds"; then
            need_go
            build "$name" "$folder" "$version"
            path="$(cached "$name" "$folder" "$version")"
        fi
        if [ -n "$path" ]; then
            printf '%s\t%s\n' "$name" "$path"
        else
            missing+=("$name")
        fi
    done <<<"$servers"
    if [ "${#missing[@]}" -gt 0 ]; then
        echo "missing: ${missing[*]}; bash tests/stack/build.sh builds them" >&2
        exit 69
    fi
}

# Prints where a server is, or nothing.
find_server() { # name folder version oldest
    local found
    while IFS= read -r found; do
        if [ -n "$found" ] && fits "$found" "$1" "$4"; then
            echo "$found"
            return
        fi
    done < <(type -aP "$1"; [ "$1" != otelcol ] || type -aP otelcol-contrib)
    found="$(cached "$1" "$2" "$3")"
    [ ! -x "$found" ] || echo "$found"
}

# Whether a server found on PATH is new enough, and holds what collector-config/ names.
fits() { # path name oldest
    local version components
    version="$(version_of "$1" "$2")" || return 1
    [ -n "$version" ] && printf '%s\n%s\n' "$3" "$version" | sort -VC || return 1
    [ "$2" = otelcol ] || return 0
    components="$("$1" components 2>/dev/null)"
    [[ "$components" = *file_storage* ]]
}

version_of() { # path name
    local option=--version
    [ "$2" != jaeger ] || option=version
    "$1" "$option" 2>&1 | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1
}

cached() { # name folder version
    echo "$cache/$2-$3-$(hash_of "$2")/$1"
}

# Of everything that a server is made from: its build folder and how it is built.
hash_of() { # folder
    { cat "$here/builds/$1"/* && sed -n '/^# How each is built/,$p' "${BASH_SOURCE[0]}"; } |
        git hash-object --stdin | cut -c 1-12
}

need_go() {
    local wanted
    wanted="$(sed -n 's/^go //p' "$here"/builds/*/go.mod | sort -V | tail -n 1)"
    if ! command -v go >/dev/null; then
        echo "the stack tests need Go $wanted or newer to build their servers; there is no \`go\`" >&2
        exit 69
    fi
    if ! printf 'go%s\n%s\n' "$wanted" "$(go env GOVERSION)" | sort -VC; then
        echo "the stack tests need Go $wanted or newer to build their servers, not $(go env GOVERSION)" >&2
        exit 69
    fi
}

build() { # name folder version
    local work target
    echo "building $1 $3 ..." >&2
    target="$(cached "$@")"
    mkdir -p "$(dirname "$target")"
    work="$(mktemp -d)"
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$work'" EXIT
    cp "$here/builds/$2"/* "$work"
    # In place by renaming: two that build at the same time do each other no harm.
    (cd "$work" && "build_${1%-server}" && mv -f "$1" "$target.$$" && mv -f "$target.$$" "$target")
    rm -rf "$work"
}

# How each is built: in a folder with its go.mod, into that folder.

export GOTOOLCHAIN=local GOFLAGS="-mod=readonly -trimpath -buildvcs=false" GOWORK=off CGO_ENABLED=0

# The builder's own `go mod tidy` asks for modules that only tests need, so it only writes the
# sources; what they need is in go.mod.
build_otelcol() {
    GOFLAGS=-buildvcs=false GOBIN="$PWD" go install "go.opentelemetry.io/collector/cmd/builder@v$COLLECTOR"
    ./builder --config manifest.yaml --skip-compilation --skip-get-modules >builder.log 2>&1 ||
        { cat builder.log >&2 && return 1; }
    cp go.mod go.sum _build
    (cd _build && go build -tags grpcnotrace,remove_all_sd -ldflags "-s -w" -o ../otelcol .)
}

build_jaeger() {
    local module=github.com/jaegertracing/jaeger
    go build -ldflags "-s -w -X $module/pkg/version.latestVersion=v$JAEGER" -o jaeger "$module/cmd/jaeger"
}

build_prometheus() { build_of_prometheus prometheus; }
build_promtool() { build_of_prometheus promtool; }

build_of_prometheus() { # name
    go build -tags remove_all_sd,netgo \
        -ldflags "-s -w -X github.com/prometheus/common/version.Version=$PROMETHEUS" \
        -o "$1" "github.com/prometheus/prometheus/cmd/$1"
}

build_toxiproxy() {
    go build -ldflags "-s -w" -o toxiproxy-server github.com/Shopify/toxiproxy/v2/cmd/server
}

main "$@"
