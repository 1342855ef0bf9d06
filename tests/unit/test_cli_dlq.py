"""The contracts of `periscope dlq` that need no server and no process of their own."""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from periscope_otel.cli import app, plain
from periscope_otel.cli.letter_options import age_option, moment_option
from periscope_otel.cli.letter_view import DECODED, preview_of
from periscope_otel.dead_letter import Filter, Letter, open_store
from periscope_otel.dead_letter.bodies import FOLDER, BodyFiles
from periscope_otel.dead_letter.codecs import encode_arguments, encode_item
from periscope_otel.dead_letter.identity import LetterIds
from periscope_otel.dead_letter.letter import STATES, pack

CLEAN = {name: None for name in os.environ if name.startswith("PERISCOPE_")}
IDS = LetterIds()
ACTS = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u200b\r\x08"
"""What a terminal would act on, or what is not to be seen."""


def fetch(url, **more):
    """Stand for a monitored function."""


def a_letter(payload: bytes | None = None, **fields) -> Letter:
    body = uuid.uuid4().bytes if payload is None else payload
    given = {
        "id": IDS.new(),
        "key": uuid.uuid4().hex,
        "operation": "store",
        "codec": "item",
        "feed": "urlhaus",
        "error_type": "ConnectTimeout",
        "error_message": "timed out",
        "fingerprint": "f1",
        "first_failed_at": time.time(),
        "last_failed_at": time.time(),
    }
    return Letter(**(given | pack(body) | fields))


def of_call(*args, **fields) -> Letter:
    encoded = encode_arguments(fetch, args, {})
    return a_letter(encoded.payload, codec=encoded.codec, **fields)


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/letters.db"


@pytest.fixture
def put(url):
    """Return what puts letters into the store."""

    def put_letters(*letters: Letter) -> None:
        with open_store(url) as store:
            assert set(store.put(letters)) == {"stored"}

    return put_letters


@pytest.fixture
def dlq(url):
    """Return what runs `periscope dlq` on the store."""

    def run(*arguments: str, store: str | None = url, **environment: str):
        where = () if store is None else ("--store", store)
        result = CliRunner().invoke(
            app,
            ["dlq", *arguments, *where],
            env={**CLEAN, "COLUMNS": "80", "TERM": "dumb", **environment},
        )
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        assert "Traceback" not in result.output
        return result

    return run


# --- text -----------------------------------------------------------------------------------------


@given(st.text())
def test_visible_text_is_printable(text):
    """What is made visible holds nothing that a terminal acts on, whatever the text."""
    assert plain.visible(text).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://evil.example/a?b=1", "hxxp://evil[.]example/a?b=1"),
        ("HTTPS://EVIL.Example:80", "HXXPS://EVIL[.]Example:80"),
        ("see ftp://evil.example", "see fxp://evil[.]example"),
        ("192.0.2.1:443", "192[.]0[.]2[.]1:443"),
        ("[2001:db8::1]", "[2001[:]db8[:][:]1]"),
        ("bob@evil.example", "bob[@]evil[.]example"),
        ("evil\u3002example", "evil[.]example"),
        ("http%3A%2F%2Fevil.example", "hxxp%3A%2F%2Fevil[.]example"),
        ("http://localhost/", "hxxp://localhost/"),
        ("http://report.json", "hxxp://report[.]json"),
        (
            "12:30:45 on 2026-01-31, 1.5 of report.json",
            "12:30:45 on 2026-01-31, 1.5 of report.json",
        ),
        ("hxxp://evil[.]example", "hxxp://evil[.]example"),
        ("d41d8cd98f00b204e9800998ecf8427e", "d41d8cd98f00b204e9800998ecf8427e"),
    ],
)
def test_indicators_are_defanged(text, shown):
    """URLs, names, addresses and mailboxes cannot be clicked; other text stays."""
    assert plain.defanged(text) == shown


@pytest.mark.parametrize("piece", ["a.", "1.", ":", "0:", "a@", "-", "[a:", "@[a", "http:/"])
def test_defanging_takes_no_longer_than_the_text_is_long(piece):
    """Ten times the text takes about ten times as long, and no more."""

    def seconds(count: int) -> float:
        text = piece * count
        return min(_timed(text) for _ in range(3))

    def _timed(text: str) -> float:
        began = time.thread_time()  # what others take of the processor does not count
        plain.defanged(text)
        return time.thread_time() - began

    assert seconds(20_000) < 40 * seconds(2_000) + 0.01


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2h", 7200), ("7d", 604800), ("1d12h", 129600), ("1w", 604800)],
)
def test_ages_are_seconds(text, seconds):
    """An age is numbers with units."""
    assert age_option(text, "--older-than") == seconds
    assert moment_option(text, "--since", lambda: 1e9) == 1e9 - seconds


@pytest.mark.parametrize(
    "text", ["2026-01-31T12:00", "2026-01-31T12:00Z", "2026-01-31T13:00+01:00"]
)
def test_times_are_utc_unless_they_say_otherwise(text):
    """A time is ISO 8601."""
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    assert moment_option(text, "--since") == noon


# --- lists ----------------------------------------------------------------------------------------


def test_list_fits_80_columns_with_whole_ids(dlq, put):
    """No line of a list is longer than 80 columns, and each id is in one piece."""
    letters = [
        a_letter(operation="o" * 90, feed="f" * 90, error_message="漢字 and more " * 90)
        for _ in range(3)
    ]
    put(*letters)
    result = dlq("list")
    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert [line.split()[0] for line in result.stdout.splitlines()[2::2]] == [
        letter.id for letter in reversed(letters)
    ]


def test_list_without_a_terminal_is_a_line_a_letter(dlq, put):
    """Where nobody says how wide it is, a letter is one line, for grep."""
    letter = a_letter()
    put(letter)
    result = dlq("list", COLUMNS="")
    (line,) = [line for line in result.stdout.splitlines() if letter.id in line]
    assert "urlhaus · ConnectTimeout: timed out" in line


def test_list_tells_how_to_go_on(dlq, put):
    """A list that is cut says with which cursor the next page begins, until all were seen."""
    letters = [a_letter() for _ in range(5)]
    put(*letters)
    seen, more = [], []
    for _ in range(10):
        page = json.loads(dlq("list", "--limit", "2", "--oldest-first", "--json", *more).stdout)
        seen += [one["id"] for one in page["letters"]]
        if page["cursor"] is None:
            break
        more = ["--cursor", page["cursor"]]
    assert seen == [letter.id for letter in letters]
    assert "--cursor 2" in dlq("list", "--limit", "2", "--oldest-first").stderr


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        (["--feed", "otx"], {"b"}),
        (["--operation", "fetch"], {"c"}),
        (["--error-type", "ReadTimeout"], {"d"}),
        (["--fingerprint", "f9"], {"e"}),
        (["--state", "parked"], {"f"}),
        (["--state", "parked", "--state", "queued"], {"f", "g"}),
        (["--until", "1h"], {"h"}),
        (["--since", "1h", "--feed", "urlhaus", "--state", "dead"], {"a", "c", "d", "e"}),
    ],
)
def test_filters_choose_letters(dlq, put, options, fits):
    """Each option leaves only the letters that it means, and several all have to fit."""
    letters = {
        "a": a_letter(),
        "b": a_letter(feed="otx"),
        "c": a_letter(operation="fetch"),
        "d": a_letter(error_type="ReadTimeout"),
        "e": a_letter(fingerprint="f9"),
        "f": a_letter(state="parked"),
        "g": a_letter(state="queued"),
        "h": a_letter(last_failed_at=time.time() - 7200),
    }
    put(*letters.values())
    found = json.loads(dlq("list", "--json", *options).stdout)["letters"]
    assert {one["id"] for one in found} == {letters[name].id for name in fits}


@pytest.mark.parametrize("command", ["list", "stats"])
def test_a_store_that_is_not_there_is_empty(dlq, tmp_path, command):
    """Looking at a store that is not there finds nothing, and does not make it."""
    result = dlq(command, store=f"sqlite:///{tmp_path}/none/letters.db")
    assert result.exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_the_settings_say_where_the_store_is(dlq, tmp_path):
    """Without `--store` it is the file in the data directory."""
    folder = tmp_path / "data"
    with open_store(f"sqlite:///{folder}/dead-letters.db") as store:
        store.put([a_letter()])
    result = dlq("stats", "--json", store=None, PERISCOPE_DATA_DIR=str(folder))
    assert json.loads(result.stdout)["total"] == 1


def test_the_default_is_the_state_directory(dlq, tmp_path):
    """Without settings it is the file in the user's state directory."""
    with open_store(f"sqlite:///{tmp_path}/periscope-otel/dead-letters.db") as store:
        store.put([a_letter()])
    result = dlq("stats", "--json", store=None, XDG_STATE_HOME=str(tmp_path))
    assert json.loads(result.stdout)["total"] == 1


# --- show -----------------------------------------------------------------------------------------


def test_show_says_why_a_letter_is_here(dlq, put):
    """`show` tells the error, the stack, where it comes from, its trace and its arguments."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    letter = of_call(
        "http://evil.example/feed",
        operation="pkg.fetch",
        error_stack='File "feeds.py", line 3',
        traceparent=f"00-{trace}-b7ad6b7169203331-01",
        host="collector-1",
        pid=42,
        versions="periscope-otel 1",
        tlp="TLP:AMBER",
        key="k1",
        batch_id="b1",
        item_index=7,
        not_before=1e9,
        attempts=4,
    )
    put(letter)
    shown = dlq("show", letter.id, PERISCOPE_JAEGER_URL="http://jaeger:16686/").stdout
    for part in (
        letter.id, "pkg.fetch", "urlhaus", "ConnectTimeout", "timed out", 'File "feeds.py", line 3',
        f"http://jaeger:16686/trace/{trace}", "collector-1, process 42", "periscope-otel 1",
        "TLP:AMBER", "k1", "b1, item 7", "2001-09-09T01:46:40Z", "4, and 0 failed replays",
        "url = 'hxxp://evil[.]example/feed'",
    ):  # fmt: skip
        assert part in shown


def test_show_takes_the_beginning_of_an_id(dlq, put):
    """Eight characters of an id are enough if no other begins so."""
    one = a_letter(id="01890000-0000-7000-8000-000000000001")
    other = a_letter(id="01890000-0000-7000-8000-000000000002")
    put(one, other, a_letter(id="01900000-0000-7000-8000-000000000003"))
    assert dlq("show", "01900000").exit_code == 0
    several = dlq("show", "01890000")
    assert several.exit_code == 1
    assert one.id in several.stderr
    assert dlq("show", "01890").exit_code == 2
    missing = dlq("show", "01999999")
    assert (missing.exit_code, missing.stdout) == (1, "")


def test_nothing_of_a_letter_acts(dlq, put):
    """Escapes, invisible characters and markup from any field are shown, and do nothing."""
    evil = f"[bold]x[/bold] [/nope] {ACTS}"
    letter = of_call(
        evil,
        operation=evil, feed=evil, error_type=evil, error_message=evil, error_stack=evil, key=evil,
        fingerprint=evil, host=evil, versions=evil, tlp=evil, batch_id=evil, headers={evil: evil},
        not_replayable_because=evil, tracestate=evil, traceparent=evil,
        content_type=evil,
    )  # fmt: skip
    put(letter)
    for arguments in (["list"], ["show", letter.id], ["stats"], ["replay"]):
        for width in ("80", "200"):
            for how in ([], ["--json"]):
                output = dlq(*arguments, *how, COLUMNS=width).output
                assert all(one.isprintable() or one == "\n" for one in output), arguments
                if not how:
                    assert "[bold]x[/bold]" in output


def test_json_is_ascii(dlq, put):
    """What programs read is ASCII, and not defanged."""
    letter = of_call("http://evil.example/ü")
    put(letter)
    shown = dlq("show", letter.id, "--json").stdout
    assert shown.isascii()
    assert "http://evil.example/ü" in json.loads(shown)["payload"]


def test_indicators_are_shown_as_they_are_if_asked_for(dlq, put):
    """`--no-defang` shows indicators as they are."""
    letter = of_call("http://evil.example/", error_message="from http://evil.example")
    put(letter)
    for arguments in (["list"], ["show", letter.id], ["stats"]):
        assert "evil.example" not in dlq(*arguments).stdout
        assert "http://evil.example" in dlq(*arguments, "--no-defang", COLUMNS="200").stdout


def test_secrets_of_a_payload_are_not_shown(dlq, put):
    """A token inside of an item is not printed, neither for people nor for programs."""
    encoded = encode_item({"api_key": "q8Zk2Lw9Xv4Tn7Rb", "url": "http://evil.example"})
    letter = a_letter(encoded.payload)
    put(letter)
    for how in ([], ["--json"]):
        assert "q8Zk2Lw9Xv4Tn7Rb" not in dlq("show", letter.id, *how).output


# --- previews -------------------------------------------------------------------------------------


def test_a_long_payload_is_cut_with_a_note(tmp_path):
    """Of a payload that has many parts the first are shown, and how much is left is said."""
    encoded = encode_item([{"n": n, "url": f"http://evil{n}.example"} for n in range(3000)])
    preview = preview_of(a_letter(encoded.payload), BodyFiles(tmp_path))
    assert "evil0.example" in preview.text
    assert len(preview.text.splitlines()) < 100
    assert "2988" in preview.text


def test_a_large_payload_is_not_unpacked_whole(tmp_path, monkeypatch):
    """No more of a compressed payload is unpacked than its preview may need."""
    unpacked = []
    decompressobj = zlib.decompressobj

    class Counting:
        def __init__(self):
            self._real = decompressobj()

        def decompress(self, data, most):
            unpacked.append(most)
            return self._real.decompress(data, most)

    letter = a_letter(bytes(50 << 20))
    monkeypatch.setattr("periscope_otel.cli.letter_view.zlib.decompressobj", Counting)
    preview = preview_of(letter, BodyFiles(tmp_path))
    assert unpacked == [DECODED + 1]
    assert "52.4MB more" in preview.note


def test_a_payload_elsewhere_is_said_to_be_there(tmp_path):
    """A payload in another host's file is not shown, but where it is."""
    letter = a_letter(b"", body_file="a" * 64, host="collector-7")
    preview = preview_of(letter, BodyFiles(tmp_path / FOLDER))
    assert preview.text == ""
    assert "collector-7" in preview.note


def test_a_payload_in_a_file_of_this_host_is_shown(tmp_path):
    """A payload in a file beside the store is shown like any other."""
    bodies = BodyFiles(tmp_path / FOLDER, inline=10)
    letter = bodies.moved_out(a_letter(encode_item({"name": "indicator"}).payload))
    assert letter.body_file is not None
    assert "indicator" in preview_of(letter, bodies).text


@given(st.binary(max_size=400), st.sampled_from(["item", "arguments", "text", "other"]))
def test_any_payload_has_a_preview(payload, codec):
    """A payload that is no payload gives a preview or says why not, and never an error."""
    letter = Letter(id="x", operation="o", codec=codec, **pack(payload))
    preview = preview_of(letter, BodyFiles("/nowhere"))
    assert preview.text or preview.note or codec == "text" or payload in (b"", b"\x80")
    assert all(one.isprintable() or one == "\n" for one in preview.text)


def test_a_damaged_payload_says_so(tmp_path):
    """A payload that cannot be unpacked says that it is damaged."""
    letter = a_letter(bytes(9000)).changed(body=b"garbage")
    assert "damaged" in preview_of(letter, BodyFiles(tmp_path)).note


# --- changes --------------------------------------------------------------------------------------


def states(url: str) -> dict[str, int]:
    with open_store(url) as store:
        return dict(store.stats().by_state)


def test_requeue_park_unpark_say_how_many(dlq, put, url):
    """Each change says how many letters it has changed, in words and in JSON."""
    put(*(a_letter() for _ in range(3)))
    assert dlq("requeue", "--limit", "1").stdout == "1 letter requeued\n"
    assert json.loads(dlq("park", "--json").stdout) == {"parked": 3, "not_found": 0}
    assert states(url) == {"parked": 3}
    assert dlq("unpark").stdout == "3 letters unparked\n"
    assert states(url) == {"dead": 3}


def test_an_id_that_is_not_there_is_status_1(dlq, put, url):
    """The letters that are there are changed, and the missing one is told."""
    letter = a_letter()
    put(letter)
    missing = IDS.new()
    result = dlq("park", letter.id, missing)
    assert result.exit_code == 1
    assert missing in result.stderr
    assert states(url) == {"parked": 1}
    in_no_state_for_it = dlq("requeue", letter.id)
    assert in_no_state_for_it.exit_code == 1
    assert f"{letter.id} is parked" in in_no_state_for_it.stderr


def test_ids_that_are_not_there_never_mean_all(dlq, put, url):
    """A command whose ids are all missing changes nothing."""
    put(a_letter(), a_letter())
    for command in (["purge", "--yes"], ["park"], ["requeue"], ["replay"]):
        assert dlq(*command, IDS.new()).exit_code == 1
    assert states(url) == {"dead": 2}


def test_purge_only_says_what_it_would_do(dlq, put, url):
    """`purge` removes nothing without `--yes`, and what is being replayed not even then."""
    put(*(a_letter() for _ in range(3)))
    with open_store(url) as store:
        store.requeue(Filter(), 1)
        assert len(store.claim("somebody", 60)) == 1
    result = json.loads(dlq("purge", "--json").stdout)
    assert result == {"purged": 2, "not_found": 0, "dry_run": True}
    assert sum(states(url).values()) == 3
    assert dlq("purge", "--yes").stdout == "2 letters purged\n"
    assert states(url) == {"claimed": 1}


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--state", "nonsense"],
        ["list", "--since", "yesterday"],
        ["list", "--queue", "no/name"],
        ["list", "--cursor", "x"],
        ["list", "--limit", "0"],
        ["show", "short"],
        ["show", "\x1b[2J\x1b[31m"],
        ["replay", "--rate", "0"],
        ["replay", "--rate", "nan"],
        ["replay", "--app", "no_such_module_anywhere"],
        ["replay", "--app", "os:no_such_thing"],
        ["replay", "--app", "../evil"],
        ["replay", "--state", "parked"],
        ["import", "/no/such/file"],
        ["import", "/"],
        ["export", "--output", "/no/such/folder/x"],
        ["sweep", "--older-than", "old"],
        ["nonsense"],
    ],
)
def test_a_mistake_is_status_2(dlq, arguments):
    """A wrong command line exits with 2, one message and nothing on standard output."""
    result = dlq(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert all(one.isprintable() or one == "\n" for one in result.stderr)


@pytest.mark.parametrize(
    "store",
    [
        "",
        "foo",
        "sqlite://x.db",
        "sqlite:///",
        "http://x",
        "redis://:a[b@h:x",
        "a:hunter2Qx9@b://c",
    ],
)
def test_a_store_that_is_no_url_is_status_2(dlq, store):
    """A URL of no store exits with 2, and its password is not repeated."""
    result = dlq("list", store=store)
    assert result.exit_code == 2
    assert "hunter2Qx9" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--store", "redis://:hunter2Qx9@127.0.0.1:1"],
        ["list", "redis://:hunter2Qx9@127.0.0.1:1"],
        ["stats", "--json", "--store", "rediss://bob:hunter2Qx9@127.0.0.1:1"],
        ["show", "redis://:hunter2Qx9@127.0.0.1:1"],
    ],
)
def test_a_secret_on_the_command_line_is_not_repeated(dlq, arguments):
    """Whatever is wrong, no message holds the password of a URL."""
    result = dlq(*arguments, store=None)
    assert result.exit_code in (2, 3)
    assert "hunter2Qx9" not in result.output


def test_a_file_that_is_no_store_is_status_3_and_left_alone(dlq, tmp_path):
    """A path that is another file's is refused; neither its content nor its mode changes."""
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    other.chmod(0o644)
    for command in (["list"], ["purge", "--yes"], ["sweep", "--yes"]):
        assert dlq(*command, store=f"sqlite:///{other}").exit_code == 3
    assert other.read_text() == "mine"
    assert other.stat().st_mode & 0o777 == 0o644


def test_a_setting_that_does_not_fit_is_status_2(dlq):
    """A wrong setting is one line, as everywhere."""
    result = dlq("list", store=None, PERISCOPE_REDIS_URL="http://x")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_help_says_the_exit_codes(dlq):
    """The help of every command says what its exit codes mean."""
    from periscope_otel.cli.dlq import app as commands

    for command in commands.registered_commands:
        name = command.name or command.callback.__name__
        result = dlq(name, "--help", store=None)
        assert result.exit_code == 0
        assert "Exit codes" in result.stdout


def test_stats_counts(dlq, put):
    """`stats` counts by state, feed and cause, with an error of each cause."""
    put(
        a_letter(), a_letter(feed="otx", state="parked"), a_letter(fingerprint="f2", error_type="X")
    )
    result = json.loads(dlq("stats", "--json").stdout)
    assert result["total"] == 3
    assert result["by_state"] == {"dead": 2, "parked": 1}
    assert result["by_feed"] == {"urlhaus": 2, "otx": 1}
    assert [(one["fingerprint"], one["letters"]) for one in result["by_fingerprint"]] == [
        ("f1", 2),
        ("f2", 1),
    ]
    assert result["by_fingerprint"][1]["error_type"] == "X"
    assert set(result["by_state"]) <= set(STATES)


def test_stats_of_many_causes_are_bounded(dlq, put):
    """People get the ten most frequent causes and feeds, programs all of them."""
    put(*(a_letter(fingerprint=f"f{n}", feed=f"feed{n}") for n in range(15)))
    text = dlq("stats").stdout
    assert text.count("and 5 more; --json has them") == 2
    assert len(json.loads(dlq("stats", "--json").stdout)["by_fingerprint"]) == 15


def test_a_long_stack_is_cut_with_a_note(dlq, put):
    """Of a long stack the first lines are shown, and how many more there are."""
    letter = a_letter(error_stack="\n".join(f"line {n}" for n in range(100)))
    put(letter)
    shown = dlq("show", letter.id).stdout
    assert "line 59\n" in shown
    assert "40 more lines" in shown


def test_a_long_text_is_cut_with_a_note(dlq, put):
    """Of a text about what could not be carried the beginning is shown, and what is left."""
    letter = a_letter(b"word " * 20_000, codec="text", replayable=False)
    put(letter)
    shown = dlq("show", letter.id).stdout
    assert "more characters" in shown
    assert "not replayable" in shown


def test_objects_of_classes_and_libraries_are_shown_as_their_fields(dlq, put):
    """Data classes, STIX objects, times and ids are shown as what they are made of."""
    import stix2

    mark = stix2.Indicator(
        pattern="[domain-name:value = 'evil.example']",
        pattern_type="stix",
        valid_from="2026-01-01T00:00:00Z",
    )
    letter = of_call({"mark": mark, "at": datetime(2026, 1, 1, tzinfo=UTC), "id": uuid.UUID(int=1)})
    put(letter)
    shown = dlq("show", letter.id).stdout
    assert "'pattern_type': 'stix'" in shown
    assert "'at': 2026-01-01 00:00:00+00:00" in shown
    assert "'id': 00000000-0000-0000-0000-000000000001" in shown


def test_a_damaged_letter_can_still_be_removed(dlq, put, url):
    """A letter that cannot be read is left out of lists, cannot be shown, and can be purged."""
    letter = a_letter()
    put(letter, a_letter())
    with open_store(url) as store, store.database.writing() as writing:
        writing.execute("UPDATE letters SET letter = x'c1' WHERE id = ?", (letter.id,))
    assert len(json.loads(dlq("list", "--json").stdout)["letters"]) == 1
    assert dlq("show", letter.id).exit_code == 1
    assert dlq("purge", letter.id, "--yes").stdout == "1 letter purged\n"


def test_a_file_that_may_not_be_read_is_status_3(dlq, url, put, monkeypatch):
    """A store that the user may not look at is told as such, not as an empty one."""

    def refuse(_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    put(a_letter())
    monkeypatch.setattr("periscope_otel.cli.letter_store._beginning_of", refuse)
    result = dlq("list")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "Permission denied" in result.stderr
