"""What leaves a text and what stays in it; see `periscope_otel.redaction`."""

import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from periscope_otel import redaction
from periscope_otel.redaction import clean_name, redact

MARKER = "[redacted]"

MISP_KEY = "q7Zr2mXk9TbVw4LsY8cHd3NfJ6pGa1EuR5oQiKxW"
OTX_KEY = "4f1c9b7a2e8d6035b1f4a7c9e2d8063f5a1b7c4e9d2f80361b5c7a4e8f9d2013"
ABUSE_KEY = "b7e2d9c4a1f8063e5b7a9d2c4f1e8063"
PASSWORD = "Tr0ub4dor&3"
JWT = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"
    ".eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6ImluZ2VzdCJ9"
    ".SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c"
)
UUID = "8e2e2d2b-17d4-4cbf-938f-98ee46b3cd3f"
PEM_BODY = "MIIEowIBAAKCAQEAx5Zq9wYk3vN1bT7s"
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzXq81LmPv9"

# Each row: a text, what must not be left of it, and what must be.
GOES = [
    # Userinfo of URLs and data source names.
    (
        "https://user:s3cr3t@taxii.example/api/",
        ["user", "s3cr3t"],
        ["https://", "@taxii.example/api/"],
    ),
    (
        "GET https://8a1f03bb@misp.example/events failed",
        ["8a1f03bb"],
        ["misp.example/events failed"],
    ),
    ("https://u:p%40ss%2Fw@feed.example:8443/x", ["p%40ss"], ["feed.example:8443/x"]),
    ("https://u:p@ss@feed.example/x", ["p@ss"], ["@feed.example/x"]),
    ("https://u:p/w?d#1@feed.example/x", ["p/w", "d#1"], ["feed.example/x"]),
    ("https://u:it's@feed.example/x", ["it's"], ["feed.example/x"]),
    ("ftp://anon:ftpw0rd@drop.example/loot.zip", ["ftpw0rd"], ["drop.example/loot.zip"]),
    ("redis://:hunter2@cache.example:6379/0", ["hunter2"], ["redis://", "cache.example:6379/0"]),
    ("postgres://ingest:pgpw@db.example/ti", ["ingest", "pgpw"], ["postgres://", "db.example/ti"]),
    (
        "postgresql+asyncpg://i:pgpw@db.example/ti",
        ["pgpw"],
        ["postgresql+asyncpg://", "db.example"],
    ),
    ("amqp://bus:rabbitpw@mq.example:5672/%2F", ["rabbitpw"], ["mq.example:5672/%2F"]),
    ("mongodb+srv://m:mongopw@c0.example/ti?w=1", ["mongopw"], ["c0.example/ti?w=1"]),
    (r'{"url":"https:\/\/sync:phppw@misp.example\/x"}', ["phppw"], [r"@misp.example\/x"]),
    ("next=https%3A%2F%2Fu%3Aencpw%40feed.example%2Fx", ["encpw"], ["%40feed.example%2Fx"]),
    ("hxxps://op:c2pw@panel[.]example/gate", ["c2pw"], ["@panel[.]example/gate"]),
    ("https://[x:v6pw@[2001:db8::7]:8443/x", ["v6pw"], ["@[2001:db8::7]:8443/x"]),
    # Parameters.
    ("https://otx.example/api?api_key=abc123", ["abc123"], ["https://otx.example/api?api_key="]),
    ("https://f.example/x?apikey=abc123&limit=5", ["abc123"], ["&limit=5"]),
    ("https://f.example/x?limit=5&key=abc123", ["abc123"], ["?limit=5&key="]),
    ("https://f.example/x?limit=5;key=abc123;page=2", ["abc123"], ["?limit=5;key=", ";page=2"]),
    ("https://f.example/x?token=abc123#top", ["abc123"], ["https://f.example/x?token="]),
    ("https://f.example/cb#access_token=abc123&state=7", ["abc123"], ["&state=7"]),
    ("https://f.example/cb?code=4%2F0AbC&state=7", ["0AbC"], ["&state=7"]),
    ("https://f.example/x?auth=abc123&q=evil.example", ["abc123"], ["&q=evil.example"]),
    ("https://f.example/x?sid=abc123", ["abc123"], ["?sid="]),
    ("https://f.example/x?session=abc123", ["abc123"], ["?session="]),
    (f"https://f.example/x?q=1&sessionid={UUID}", [UUID], ["?q=1"]),
    ("https://a.blob.example/c/x?sv=2024&sig=aB%2Fc1%3D&se=1", ["aB%2Fc1"], ["?sv=2024", "&se=1"]),
    (
        "https://b.s3.example/x?X-Amz-Credential=AKIDX%2F2024&X-Amz-Expires=60&X-Amz-Signature=f00d",
        ["AKIDX", "f00d"],
        ["X-Amz-Expires=60"],
    ),
    ("https://b.s3.example/x?X-Amz-Security-Token=IQoJb3Jp", ["IQoJb3Jp"], ["b.s3.example/x"]),
    (
        "https://b.s3.example/x?AWSAccessKeyId=AKIDX&Signature=f0d",
        ["AKIDX", "f0d"],
        ["b.s3.example"],
    ),
    ("https://f.example/x?api%5Fkey=abc123", ["abc123"], ["https://f.example/x?api_key="]),
    ("https://f.example/x?q=1&%61pi%2Dkey=abc123", ["abc123"], ["?q=1&"]),
    ("https://f.example/x?api%255Fkey=abc123", ["abc123"], ["https://f.example/x?"]),
    ("r?u=https%3A%2F%2Ff.example%2F%3Fkey%3Dabc123", ["abc123"], ["f.example"]),
    ("https://f.example/x?a=1&amp;token=abc123", ["abc123"], ["?a=1&amp;token="]),
    ("username=ingest&password=hunter2&grant_type=password", ["hunter2"], ["grant_type=password"]),
    ("code=abc123&grant_type=authorization_code", ["abc123"], ["grant_type=authorization_code"]),
    ("client_id=x&client_secret=abc123", ["abc123"], ["client_id=x"]),
    ("jdbc:mysql://db.example/ti?user=u&password=p%26w", ["p%26w"], ["db.example/ti?user=u"]),
    # What HTTP clients say.
    (
        (
            "HTTPSConnectionPool(host='otx.example', port=443): Max retries exceeded with url: "
            f"/api/v1/pulses?apikey={OTX_KEY} (Caused by NewConnectionError('timed out'))"
        ),
        [OTX_KEY],
        ["host='otx.example', port=443", "/api/v1/pulses?apikey=", "(Caused by NewConnectionError"],
    ),
    (
        f"403 Client Error: Forbidden for url: https://feed.example/v2?auth_token={ABUSE_KEY}",
        [ABUSE_KEY],
        ["403 Client Error: Forbidden for url: https://feed.example/v2?auth_token="],
    ),
    (
        (
            f"Client error '401 Unauthorized' for url 'https://vt.example/f/1?apikey={OTX_KEY}'\n"
            "For more information check: https://developer.example/Status/401"
        ),
        [OTX_KEY],
        [
            "'401 Unauthorized'",
            "'\nFor more information check: https://developer.example/Status/401",
        ],
    ),
    (
        "LocationParseError: Failed to parse: https://svc:p/w@proxy.example:3128",
        ["svc", "p/w"],
        ["@proxy.example:3128"],
    ),
    # Authorization.
    ("Authorization: Basic dXNlcjpwYXNz", ["dXNl"], ["Authorization: "]),
    ("authorization: bearer abc.def.ghi", ["abc", "ghi"], []),
    ("Proxy-Authorization: Basic dXNlcjpwYXNz", ["dXNl"], ["Proxy-Authorization: "]),
    (f"Authorization: {MISP_KEY}", [MISP_KEY], ["Authorization: "]),
    (f"Authorization: {MISP_KEY} https://misp.example/events", [MISP_KEY], ["misp.example/events"]),
    ("Authorization: ApiKey ingest:abc123", ["abc123", "ingest"], []),
    ("Authorization: Token abc123", ["abc123"], []),
    ('Authorization: Token token="abc 123", nonce="def"', ["abc", "123"], []),
    (
        'Authorization: Digest username="in gest", realm="t", response="6629fae"\nHost: t.example',
        ["in gest", "6629fae"],
        ["\nHost: t.example"],
    ),
    (
        "Authorization: AWS4-HMAC-SHA256 Credential=AKIDX/20240101, Signature=f00d",
        ["AKIDX", "f00d"],
        [],
    ),
    (
        "{'Authorization': 'Bearer abc123', 'Accept': 'application/taxii+json'}",
        ["abc123"],
        ["taxii+json"],
    ),
    (
        "{b'authorization': b'Basic dXNl', b'host': b't.example'}",
        ["dXNl"],
        ["b'host': b't.example'"],
    ),
    ('{"Authorization":"Bearer abc123","host":"t.example"}', ["abc123"], ['"host":"t.example"']),
    (r"{\"Authorization\": \"Bearer abc123\", \"n\": 1}", ["abc123"], [r"\"n\": 1"]),
    ('{"Authorization":["Bearer abc123"],"n":1}', ["abc123"], ['"n":1']),
    (
        "[(b'Authorization', b'Bearer abc123'), (b'Host', b't.example')]",
        ["abc123"],
        ["b't.example'"],
    ),
    ('{"name": "Authorization", "value": "Bearer abc123"}', ["abc123"], ['"value": "']),
    (
        r"b'GET / HTTP/1.1\r\nAuthorization: Basic dXNl\r\nHost: t.example\r\n'",
        ["dXNl"],
        ["Host: t.example"],
    ),
    (
        f"curl -H 'Authorization: {MISP_KEY}' https://misp.example",
        [MISP_KEY],
        ["https://misp.example"],
    ),
    ("curl -u analyst:hunter2 https://taxii.example/", ["hunter2"], ["https://taxii.example/"]),
    ("rejected: Bearer a8f7c6d5e4b3", ["a8f7c6d5e4b3"], ["rejected: Bearer "]),
    ("rejected: Basic dXNlcjpwYXNz", ["dXNlcjpwYXNz"], ["rejected: Basic "]),
    # Headers with API keys.
    (f"X-OTX-API-KEY: {OTX_KEY}", [OTX_KEY], ["X-OTX-API-KEY: "]),
    (f"Auth-Key: {ABUSE_KEY}", [ABUSE_KEY], ["Auth-Key: "]),
    (f"headers={{'Auth-Key': '{ABUSE_KEY}'}}", [ABUSE_KEY], ["{'Auth-Key': '"]),
    (f'{{"x-apikey": "{OTX_KEY}"}}', [OTX_KEY], ['{"x-apikey": "']),
    ("X-Api-Key: abc123", ["abc123"], ["X-Api-Key: "]),
    ("X-Auth-Token: abc123", ["abc123"], ["X-Auth-Token: "]),
    ("api-key=abc123 url=https://f.example", ["abc123"], ["url=https://f.example"]),
    (
        "Client(api_key='abc123', base_url='https://f.example')",
        ["abc123"],
        ["base_url='https://f.example'"],
    ),
    ("os.environ['OTX_API_KEY'] = 'abc123'", ["abc123"], ["OTX_API_KEY"]),
    ("apikey : abc123", ["abc123"], ["apikey : "]),
    ("invalid API key: abc123", ["abc123"], ["invalid API key: "]),
    (f"misp_key={MISP_KEY}", [MISP_KEY], ["misp_key="]),
    (f"key: {OTX_KEY}", [OTX_KEY], ["key: "]),
    ("<apikey>abc 123</apikey><host>t.example</host>", ["abc", "123"], ["<host>t.example</host>"]),
    # Cookies.
    ("Cookie: sid=abc123; csrf=def456\nHost: t.example", ["abc123", "def456"], ["Host: t.example"]),
    ("Set-Cookie: MISP=abc123; Path=/; HttpOnly", ["abc123"], ["Set-Cookie: "]),
    ("{'Cookie': 'a=abc123; b=def456', 'n': 1}", ["abc123", "def456"], ["'n': 1"]),
    ("get(url, cookies={'a': 'abc123'}, timeout=5)", ["abc123"], ["timeout=5"]),
    ("<Cookie a=abc123 for t.example/>", ["abc123"], ["for t.example/>"]),
    ("get(url, auth=('taxii', 'hunter2'), timeout=5)", ["hunter2"], ["timeout=5"]),
    # Private keys.
    (
        f"-----BEGIN RSA PRIVATE KEY-----\n{PEM_BODY}\n-----END RSA PRIVATE KEY-----\nevil.example",
        [PEM_BODY],
        ["evil.example"],
    ),
    (f"key -----BEGIN PRIVATE KEY-----\n{PEM_BODY}", [PEM_BODY, "BEGIN"], ["key "]),
    (
        rf"'-----BEGIN EC PRIVATE KEY-----\n{PEM_BODY}\n-----END EC PRIVATE KEY-----' evil.example",
        [PEM_BODY],
        ["evil.example"],
    ),
    (
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{PEM_BODY}\n-----END PGP PRIVATE KEY BLOCK-----",
        [PEM_BODY],
        [],
    ),
    # Tokens by their shape.
    ("creds AKIAQ7ZR2MXK9TBVW4LS used", ["AKIAQ7ZR"], ["creds ", " used"]),
    ("sts ASIAQ7ZR2MXK9TBVW4LS", ["ASIAQ7ZR"], ["sts "]),
    (f"aws_secret_access_key = {AWS_SECRET}", [AWS_SECRET], ["aws_secret_access_key = "]),
    (f'"SecretAccessKey": "{AWS_SECRET}"', [AWS_SECRET], ['"SecretAccessKey": "']),
    ("clone with ghp_" + "a1B2" * 9, ["a1B2"], ["clone with "]),
    ("clone with github_pat_" + "a1B2_" * 9, ["a1B2"], ["clone with "]),
    ("glpat-x7Zr2mXk9TbVw4LsY8cH", ["x7Zr"], []),
    ("xoxb-123456789012-abcdefABCDEF", ["abcdef"], []),
    ("AIzaSy" + "a1B2c" * 7, ["a1B2c"], []),
    (f"jwt was {JWT}, expired", JWT.split("."), ["jwt was ", ", expired"]),
    (f"cut {JWT[:60]}", [JWT[:36]], ["cut "]),
    ("stripe sk_live_4eC39HqLyjWDarjtT1zdp7dc", ["4eC39H"], ["stripe "]),
    ("openai sk-proj-a1B2c3D4e5F6g7H8i9J0", ["a1B2c3"], ["openai "]),
    ("anthropic sk-ant-api03-a1B2c3D4e5F6g7H8", ["a1B2c3"], ["anthropic "]),
    ("npm_" + "a1B2" * 9, ["a1B2"], []),
    ("pypi-AgEIcHlwaS5vcmcCJDU3M2Y5", ["cHlwaS5"], []),
    # Pairs in free text.
    (
        "login failed: password=hunter2, user=bob",
        ["hunter2"],
        ["login failed: password=", "user=bob"],
    ),
    ("login failed (passwd: hunter2)", ["hunter2"], ["login failed (passwd: "]),
    ("secret='two words' host=t.example", ["two", "words"], ["host=t.example"]),
    ('{"password": "a\\"b c", "n": 1}', ["b c"], ['"n": 1']),
    ('{"password": "not closed', ["not closed"], ['{"password": "']),
    ("DB_PASSWORD=p,a;s&s host", ["p,a", "s&s"], [" host"]),
    ("password: p\u200bw1\u200b23 done", ["w1", "23"], [" done"]),
    ("pass\x1b[31mword: hunter2", ["hunter2"], []),
    ("password:\u2003hunter2", ["hunter2"], []),
    (r"Traceback\npassword: hunter2\nevil.example", ["hunter2"], ["evil.example"]),
    ("password: api_key: hunter2", ["hunter2"], []),
    ("Basic password=hunter2", ["hunter2"], []),
    ("Bearer api_key='hunter2'", ["hunter2"], []),
    ("Endpoint=sb://b.example/;SharedAccessKey=aB1+/=;EntityPath=x", ["aB1"], [";EntityPath=x"]),
    ("ingest --api-key abc123 --feed urlhaus", ["abc123"], ["--feed urlhaus"]),
    ('token="abc123" feed=otx', ["abc123"], ["feed=otx"]),
    ("{'token': 'abc123', 'feed': 'otx'}", ["abc123"], ["'feed': 'otx'"]),
]

MD5 = "d41d8cd98f00b204e9800998ecf8427e"
SHA1 = "da39a3ee5e6b4b0d3255bfef95601890afd80709"
SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

STAYS = [
    # Indicators with the words in their names.
    "auth-paypal-login.example",
    "token-grabber.example/login?user=1",
    "https://evil.example/session/steal",
    "https://secure-auth.example/password/reset?user=1",
    "https://evil.example:8443/token/api_key/secret.php",
    "http://secret:8080/gate",
    "http://token.evil.example:8080/x@y",
    "https://medium.example/@analyst",
    "https://evil.example?mail=victim@corp.example",
    "http://[2001:db8::1]:80/a@b",
    "hxxps://evil[.]example",
    "hxxps://auth-session[.]evil[.]example:8443/token",
    "hxxp://1.2.3[.]4/password.php",
    "secretstealer.exe",
    "password_stealer.dll: detected",
    r"C:\Users\x\tokens.db",
    r"C:\Users\x\AppData\secret: access denied",
    "/run/secrets/password: permission denied",
    "/etc/secret.key",
    "api_key.txt",
    "session-hijack.ps1",
    "auth@token.example",
    "password@evil.example: bounced",
    "sk-slovenska-posta-sledovanie-2024.example",
    "eyJ0ZXN0IjoxfQ.tunnel.evil.example",
    # Hashes, addresses, ids.
    f"md5 {MD5}",
    f"sha1={SHA1}",
    f"sha256: {SHA256}",
    f"duplicate key: {SHA256}",
    f"sha512 {SHA256}{SHA256}",
    "ssdeep 3:AXGBicFlgVNhBGcL6wCrFQEv:AXGHsNhxLsr2C",
    "imphash f34d5f2d4577ed6d9ceec516c1f5a744",
    "198.51.100.7:443",
    "2001:db8:85a3::8a2e:370:7334",
    "CVE-2024-3094",
    "key: CVE-2024-1234567890123",
    f"indicator--{UUID}",
    f"key: indicator--{UUID}",
    "sid: S-1-5-21-3623811015-3361044348",
    "alert tcp any any (sid:2019401; rev:3;)",
    "phish@corp.example",
    r"[windows-registry-key:key = 'HKEY_LOCAL_MACHINE\\Software\\Run']",
    "[url:value = 'https://evil.example/session'] AND [file:name = 'secretstealer.exe']",
    '{"signature": "AgentTesla", "file_name": "password.exe"}',
    "T1555.003 Credentials from Password Stores: Credentials from Web Browsers",
    "Unsecured Credentials: Private Keys",
    "Steal Web Session Cookie: T1539",
    "Brute Force: Password Guessing",
    "PWS:Win32/Zbot",
    # Prose and errors.
    "token expired",
    "token: expired",
    "invalid password",
    "authentication failed: bad session",
    "secret key rotation policy",
    "KeyError: 'api_key'",
    "missing fields ['api_key', 'token', 'limit']",
    "Basic authentication required",
    "Bearer authentication required",
    "basic PowerShell script",
    "not well-formed (invalid token): line 1, column 12",
    "Unexpected token: '<'",
    "status code=503",
    "exit code: 137",
    "https://f.example/x?status_code=403&keyword=abc123",
    "Key (id)=(7) already exists",
    "cookie: not found",
    "api_key=None, token=null",
    '{"password": "", "token_type": "bearer"}',
    "auth=()",
    "redis key: periscope:feed:otx",
    "key: evil.example",
    "key=feed-2024-01-15-urlhaus",
    "session: <requests.sessions.Session object at 0x7f3a5c1b2d30>",
    "vault secret://ingest/otx",
    "-----BEGIN CERTIFICATE-----\nMIIDdzCCAl+gAwIBAgIE\n-----END CERTIFICATE-----",
    "HTTPSConnectionPool(host='urlhaus.example', port=443): Read timed out. (read timeout=10)",
    "line one\n\tline two",
    "Пароль неверен: вход",
    "report…",
]


@pytest.mark.parametrize(("text", "gone", "kept"), GOES)
def test_secrets_go(text: str, gone: list[str], kept: list[str]) -> None:
    """A secret goes, and what stands around it stays."""
    result = redact(text)
    assert MARKER in result
    assert [secret for secret in gone if secret in result] == []
    assert [piece for piece in kept if piece not in result] == []


@pytest.mark.parametrize("text", STAYS)
def test_indicators_stay(text: str) -> None:
    """A text without secrets comes back as it was."""
    assert redact(text) == text


@pytest.mark.parametrize("text", [text for text, _, _ in GOES])
def test_redacted_text_stays_as_it_is(text: str) -> None:
    """Redacting a redacted text changes nothing."""
    once = redact(text)
    assert redact(once) == once


@pytest.mark.parametrize("text", [text for text, _, _ in GOES])
def test_hints_miss_nothing(text: str) -> None:
    """A rule that matches a text finds one of its hints there, in any case of letters."""
    for variant in (text, text.upper(), text.lower()):
        for hints, rule in redaction._RULES:
            if redaction._compiled(rule).search(variant):
                assert any(hint in variant.casefold() for hint in hints), rule


def test_every_rule_is_of_use() -> None:
    """Each rule finds something in the table of what goes."""
    idle = [
        rule
        for _, rule in redaction._RULES
        if not any(redaction._compiled(rule).search(text) for text, _, _ in GOES)
    ]
    assert idle == []


def test_tables_are_wide() -> None:
    """Both tables hold at least sixty rows, so that nobody thins them out unnoticed."""
    assert min(len(GOES), len(STAYS)) >= 60


@pytest.mark.parametrize("secret", ["a", "hunter2", "x" * 40, "x" * 300])
def test_marker_tells_nothing(secret: str) -> None:
    """The marker is the same whatever it replaces."""
    assert redact(f"password={secret}") == f"password={MARKER}"


# --- what is printed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a\x00b\x07c\x7fd\x85e", "a b c d e"),
        ("a\tb\r\nc", "a\tb\nc"),
        ("\x1b[1;31mred\x1b[0m \x1b[K.", "red ."),
        ("\x9b31mred\x9bm", "red"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b\x9d1\x9cc", "abc"),
        ("\x1b]0;not closed", "0;not closed"),
        ("\x1bPq#1\x1b\\a\x1b(Bb\x1bcc", "abcc"),
        ("\x1b\x1b[31m[31m", "[31m"),
        ("\x1b\u200b[31mred", "red"),
        ("\x1b[ password=x", f" password={MARKER}"),
        ("\x1b[31 password=x", f" password={MARKER}"),
        ("\x1bpassword=x", f"password={MARKER}"),
        ("\u202eexe.\u2066cod\u2069", "exe.cod"),
        ("a\ud800b\udfff", "a\ufffdb\ufffd"),
        ("\ud83d\ude00", "\ufffd\ufffd"),
        ("a\u2028b", "a\nb"),
        ("bücher.example 攻击", "bücher.example 攻击"),
    ],
)
def test_nothing_acts_on_a_terminal(text: str, result: str) -> None:
    """Controls, escapes, bidi overrides and surrogates are removed or replaced."""
    assert redact(text) == result


@pytest.mark.parametrize(
    ("text", "limit", "result"),
    [
        ("", 5, ""),
        ("abcdef", 6, "abcdef"),
        ("abcdef", 5, "abcd…"),
        ("abcdef", 1, "…"),
        ("abcdef", 0, ""),
        ("abcdef", -1, ""),
        ("password=x", 19, f"password={MARKER}"),
        ("password=x", 18, "password=…"),
        ("password=x", 10, "password=…"),
        ("password=x", 9, "password…"),
        ("password=x and more", 20, f"password={MARKER}…"),
        ("ghp_" + "a1B2" * 9, 9, "…"),
    ],
)
def test_limit(text: str, limit: int, result: str) -> None:
    """A text longer than the limit ends in an ellipsis, and a marker is never cut."""
    assert redact(text, limit) == result


@pytest.mark.parametrize("pad", range(40))
def test_window_never_cuts_a_secret_in_two(pad: int) -> None:
    """A secret that crosses the end of the window leaves nothing behind."""
    limit = 1 << 14
    room = redaction._WINDOW + limit - pad
    secret = f"https://user:{'s3cr3t' * 8}@host.example/ and more"
    # One long value in front makes room, so that the end of the window is within the limit.
    text = f"password={'p' * 9000} ".ljust(room, "x") + " " + secret
    result = redact(text, limit)
    assert "s3c" not in result
    assert "user" not in result
    assert result.endswith("…")


def test_window_keeps_json_before_its_end() -> None:
    """JSON without a blank is cut between two strings."""
    row = '{"ioc":"evil.example","type":"domain"},'
    result = redact(f'{{"password":"{"p" * 9000}"}},' + row * 400, 2000)
    assert result.startswith(f'{{"password":"{MARKER}"}},{row}')
    assert result.endswith("…")


def test_window_of_one_token_leaves_nothing() -> None:
    """One endless token may be half a secret, so nothing of it stays."""
    assert redact("A" * 100_000) == "…"


def test_text_that_never_settles_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the rules change a text again and again, only the marker comes back."""
    monkeypatch.setattr(redaction, "_apply_rules", lambda text: text + "x")
    assert redact("abc") == MARKER


# --- properties ---------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            "password",
            "Authorization",
            "Cookie",
            "token",
            "key",
            "api_key",
            "Bearer",
            "Basic",
            "sk-",
        ),
        *(
            ":",
            "=",
            " ",
            "\n",
            "'",
            '"',
            "\\",
            "[",
            "]",
            "(",
            ")",
            "{",
            "}",
            "<",
            ">",
            ",",
            ";",
            "&",
        ),
        *("?", "#", "@", "/", "//", "://", "%3D", "%", ".", "-", "--", "_", "…", MARKER, "[reda"),
        *(
            "\x1b",
            "\x1b[",
            "\x1b]",
            "\x07",
            "\u200b",
            "\u202e",
            "\ud800",
            "\r",
            "\x00",
            "\\n",
            "-u ",
        ),
        *("eyJhbG", "AKIA", "ghp_", "-----BEGIN PRIVATE KEY-----", "a1B2c3D4e5F6g7H8", "x", "user"),
        *("https://", "evil.example", "name", "value", "None", "1"),
    ]
)
ANY_TEXT = st.one_of(
    st.text(st.characters(codec=None, exclude_categories=())),
    st.lists(PIECES, max_size=30).map("".join),
)


@settings(deadline=None)  # the first example compiles the rules
@given(text=ANY_TEXT, limit=st.integers(-1, 300))
@example(text="password=…", limit=12)
def test_result_is_bounded_stable_and_harmless(text: str, limit: int) -> None:
    """Whatever the text: the result is bounded, settled, encodable and printable."""
    result = redact(text, limit)
    assert len(result) <= max(limit, 0)
    assert redact(result, limit) == result
    result.encode("utf-8")
    assert {c for c in result if unicodedata.category(c) in {"Cc", "Cs"}} <= {"\n", "\t"}
    assert not set(result) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


CANARY = "Zq7Xw9Kp2Vm4Rt8Yb3Nc6Hd1Lf5Gs0Ja"
TEMPLATES = [
    "https://user:{}@taxii.example/x",
    "https://{}@taxii.example/x",
    "redis://:{}@cache.example:6379/0",
    "https://f.example/x?api_key={}&limit=5",
    "https://f.example/x?limit=5&key={}",
    "Authorization: {}",
    "Authorization: Bearer {}",
    "Proxy-Authorization: Basic {}",
    'Authorization: Digest username="u", realm="r", response="{}"',
    "{{'Authorization': 'Bearer {}'}}",
    "{{b'authorization': b'{}'}}",
    '{{"x-apikey": "{}"}}',
    "X-OTX-API-KEY: {}",
    "Auth-Key: {}",
    "Cookie: a={}",
    "Set-Cookie: a={}; Path=/",
    "password={}",
    "passwd: {}",
    "secret='{}'",
    "aws_secret_access_key = {}",
    "ghp_{}",
    "glpat-{}",
    "xoxb-{}",
    "npm_{}",
    "pypi-AgEI{}",
    "sk-ant-api03-{}",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{}",
    "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----",
    "<apikey>{}</apikey>",
    "--token {}",
    "misp_key={}",
    "Client(api_key='{}', n=1)",
    'Client(api_key="{}", n=1)',
    "{{'password': '{}'}}",
    "password: '{}'",
    "('Authorization', 'Bearer {}')",
    "curl -u user:{} -s",
    "get(auth=('user', '{}'))",
]


@settings(deadline=None)  # the first example compiles the rules
@given(
    template=st.sampled_from(TEMPLATES),
    left=st.text(st.characters(codec=None, exclude_categories=())),
    right=st.text(st.characters(codec=None, exclude_categories=())),
    blank=st.sampled_from(" \n\t"),
    limit=st.integers(1, 400),
)
def test_secret_goes_from_any_surroundings(
    template: str, left: str, right: str, blank: str, limit: int
) -> None:
    """A secret goes whatever stands before and after it, and wherever the text is cut."""
    result = redact(left + blank + template.format(CANARY) + blank + right, limit)
    assert not [i for i in range(len(CANARY) - 7) if CANARY[i : i + 8] in result]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "left",
    [
        "password:",
        "token =",
        "Authorization:",
        "Authorization: Basic",
        "--secret",
        "key:",
        "-u",
        "'",
        "api_key: '",
        "auth=(",
        "cookies={",
        "<password>",
        "Cookie: a=b",
        "x" * 3000,
        "https://a:",
        '"password": "',
        '"',
        "key",
        "secret",
        "-",
        "{",
        "&key=",
        "cookie:",
        "api_key=None",
        "\\",
    ],
)
def test_secret_goes_after_another_name(template: str, left: str) -> None:
    """The name of a secret before another secret doesn't protect that one."""
    result = redact(f"{left} {template.format(CANARY)} evil", 9999)
    assert CANARY not in result


MIB = 1 << 20
HOSTILE = [
    *("a", ":", "@", "=", "'", '"', "\\", "/", "-", "%", "&", ";", "[", "{", "(", "<", "\n", " "),
    *(
        "-----BEGIN ",
        "-----BEGIN PRIVATE KEY-----",
        "eyJ.",
        "eyJ",
        "eyJa-",
        "eyJhbGa.",
        "=&",
        "&a=",
    ),
    *(
        "https://",
        "://a:b",
        "://a:",
        "a:b@",
        "%3A%2F%2F",
        "\x1b[",
        "\x1b]",
        "\x1b",
        "\x9b1;",
        "\u200b",
    ),
    *("password", "password ", "password:", "password=", "password='", "password: \\", "token: a1"),
    *("Authorization: ", 'Authorization: a="', "Cookie: a=", "Cookie: ", "Bearer a", "Basic aA"),
    *(
        "sk-a",
        "ghp_",
        "AKIA",
        "xoxb-",
        "SG.aa",
        "api key",
        "key=",
        "?key=",
        ";,",
        "),",
        "[redacted]",
    ),
    *("--password ", "-u a:", "<token>", "('token','", "auth=(", "a.b-", "%61", "\ud800", "é", "…"),
    *(
        "\\n",
        "\\npassword:",
        "key: a1a1a1a1a1a1a1a1.",
        "<Cookie a",
        '=\\"',
        'a="',
        "key=a&",
        " password: password",
    ),
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_megabyte_is_dealt_with(piece: str) -> None:
    """No text makes a rule run away: neither through the window nor on a whole text at once."""
    text = (piece * (MIB // len(piece) + 1))[:MIB]
    began = time.thread_time()  # what others take of the processor does not count
    assert len(redact(text)) <= 1024
    assert len(clean_name(text)) <= 200
    assert redaction._apply_rules(text[: 1 << 16])
    assert time.thread_time() - began < 10


# --- names --------------------------------------------------------------------------------------


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("urlhaus.recent", "urlhaus.recent"),
        ("", ""),
        ("a b", "a b"),
        (" a", "a"),
        ("a ", "a"),
        (" ", ""),
        ("a  b\n\tc\u2003d\u2028e", "a b c d e"),
        ("\x1b[31mred\x1b[0m\x00\x07", "red"),
        ("\u202eexe\ud800", "exe\ufffd"),
        ("password=hunter2", "password=hunter2"),
        (42, "42"),
        (None, "None"),
        (ValueError("bad\nfeed"), "bad feed"),
        (Unprintable(), "<Unprintable>"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 199 + "…"),
        ("攻击", "攻击"),
    ],
)
def test_clean_name(value: object, name: str) -> None:
    """A name is one clean line, and nothing in it is redacted."""
    assert clean_name(value) == name


@pytest.mark.parametrize(("limit", "name"), [(3, "ab…"), (1, "…"), (0, ""), (-1, "")])
def test_clean_name_limit(limit: int, name: str) -> None:
    """A name longer than the limit ends in an ellipsis, if there is room for one."""
    assert clean_name("abcdef", limit) == name


def test_clean_name_returns_a_plain_name_itself() -> None:
    """A plain short name is not copied."""
    plain = "-".join(["feed", str(len(HOSTILE))])
    assert clean_name(plain) is plain


@settings(deadline=None)  # the first example compiles the rules
@given(text=ANY_TEXT, limit=st.integers(-1, 40))
def test_clean_name_is_bounded_stable_and_one_line(text: str, limit: int) -> None:
    """Whatever the value: its name is bounded, settled, encodable and a single line."""
    name = clean_name(text, limit)
    assert len(name) <= max(limit, 0)
    assert clean_name(name, limit) == name
    name.encode("utf-8")
    assert not {c for c in name if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}}
    assert name == name.strip()
    assert "  " not in name
