#!/usr/bin/env bash
# Runs Collector, Jaeger and Prometheus on this machine with the configurations beside this file,
# until Ctrl-C. The servers come from PATH, or from where tests/stack/build.sh has built them.
#
#   bash collector-config/run.sh [FOLDER]
#
# FOLDER is where they keep their data and logs; periscope-otel/stack in the user's state directory
# by default. The variables in collector.yaml and jaeger.yaml move them to other ports, and
# PROMETHEUS_LISTEN (127.0.0.1:9090) moves Prometheus.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
data="${1:-${XDG_STATE_HOME:-$HOME/.local/state}/periscope-otel/stack}"
prometheus_listen="${PROMETHEUS_LISTEN:-127.0.0.1:9090}"
export COLLECTOR_STORAGE="${COLLECTOR_STORAGE:-$data/collector}"
export JAEGER_OTLP="${JAEGER_OTLP:-${JAEGER_OTLP_GRPC:-127.0.0.1:14317}}"
export PROMETHEUS_OTLP="${PROMETHEUS_OTLP:-http://$prometheus_listen/api/v1/otlp}"

umask 077
mkdir -p "$data"
servers="$(bash "$here/../tests/stack/build.sh" --list otelcol jaeger prometheus)"
running=()
trap 'stop' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

main() {
    OTEL_TRACES_SAMPLER=always_off start jaeger --config "$here/jaeger.yaml"
    start prometheus "--config.file=$here/prometheus.yaml" "--storage.tsdb.path=$data/prometheus" \
        "--web.listen-address=$prometheus_listen" --web.enable-otlp-receiver \
        "--enable-feature=exemplar-storage,created-timestamp-zero-ingestion,promql-extended-range-selectors"
    # 80 % of the Collector's hard limit
    GOMEMLIMIT="${GOMEMLIMIT:-410MiB}" start otelcol --config "$here/collector.yaml"
    wait_for Jaeger "http://${JAEGER_HEALTH:-127.0.0.1:14133}/status"
    wait_for Prometheus "http://$prometheus_listen/-/ready"
    wait_for Collector "http://${COLLECTOR_HEALTH:-127.0.0.1:13133}/"
    cat <<TEXT
Collector   takes OTLP at http://${COLLECTOR_OTLP_HTTP:-127.0.0.1:4318} and, by gRPC, at http://${COLLECTOR_OTLP_GRPC:-127.0.0.1:4317}
Jaeger      http://${JAEGER_QUERY_HTTP:-127.0.0.1:16686}
Prometheus  http://$prometheus_listen
Data and logs are in $data. Ctrl-C ends all three.
TEXT
    while all_run; do sleep 0.5; done
    echo "one of the servers has ended; the last lines of each log:" >&2
    tail -n 3 "$data"/*.log >&2
    exit 1
}

start() { # name arguments
    local name="$1" path
    shift
    path="$(awk -F '\t' -v name="$name" '$1 == name { print $2 }' <<<"$servers")"
    "$path" "$@" >"$data/$name.log" 2>&1 &
    running+=("$!")
}

wait_for() { # name url
    local _
    for _ in $(seq 300); do
        if answers "$2"; then return; fi
        all_run || break
        sleep 0.1
    done
    echo "$1 does not answer at $2; the last lines of each log in $data:" >&2
    tail -n 3 "$data"/*.log >&2
    exit 1
}

all_run() {
    local pid
    for pid in "${running[@]}"; do kill -0 "$pid" 2>/dev/null || return 1; done
}

answers() { # url, by bash alone
    local address="${1#http://}" path host port
    path="/${address#*/}"
    address="${address%%/*}"
    host="${address%:*}" port="${address##*:}"
    (exec 3<>"/dev/tcp/$host/$port" && printf 'GET %s HTTP/1.0\r\n\r\n' "$path" >&3 &&
        head -n 1 <&3 | grep -q ' 200 ') 2>/dev/null
}

stop() {
    trap - EXIT
    [ "${#running[@]}" -eq 0 ] || kill "${running[@]}" 2>/dev/null || true
    wait
}

main
