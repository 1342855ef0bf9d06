r"""Make text from the outside safe to store and to print.

Error messages of feed clients carry credentials (`https://user:pass@host`, `Authorization: ...`)
next to what an analyst needs to see (domains, hashes, URLs, file names). `redact` takes the first
out and leaves the second alone; `clean_name` only makes a value fit for a name or a label.

How `redact` works:

1. It looks at a bounded window, so that a huge text costs no more than a long one.
2. It removes what a terminal could act on, and invisible characters: both could split a secret.
3. It applies `_RULES` from top to bottom. Every rule is linear: a scan starts only where a word
   starts, and repetitions are possessive or bounded, so a failed attempt is not read again.
4. It cuts to the limit, never inside a marker, and repeats 3 and 4 until nothing changes.
"""

import re
from functools import cache
from typing import Final

__all__ = ["clean_name", "names_a_secret", "redact"]

_MARKER: Final = "[redacted]"
_CUT: Final = "…"
_WINDOW: Final = 8192
_ROUNDS: Final = 6

# --- words that name a secret -------------------------------------------------------------------
# `?` stands for an optional `-`, `_` or blank, `#` for a digit. A name counts by its end, so that
# `OTX_API_KEY`, `X-Api-Key` and `otx.api-key` are all `api?key`, and `password_stealer.dll` is
# nothing.

# A value after one of these always goes, whatever it looks like.
_SURE: Final = (
    *("api?key", "api.key", "auth?key", "access?key", "access?key?id", "secret?key", "private?key"),
    *("account?key", "app?key", "consumer?key", "encryption?key", "master?key", "shared?key"),
    *("signing?key", "subscription?key", "password", "password#", "passwd", "passphrase", "pwd"),
    *("passcode", "secret", "-token", "_token", ".token", "accesstoken", "apitoken", "authtoken"),
    *("idtoken", "refreshtoken", "securitytoken", "sessiontoken", "session?id", "sessid"),
    *("amz-credential", "amz-signature", "goog-credential", "goog-signature"),
)
# Values of these go too, but they may hold blanks and have rules of their own.
_HEADERS: Final = ("authorization", "cookie")
# These are everyday words ("token: expired", "Unsecured Credentials: Private Keys"). They count
# as names of secrets before `=`, or when they are quoted as the key of a mapping.
_OFTEN: Final = ("token", "credential", "credentials", "creds", "jwt")
# And these only when what follows is one long run of letters and digits.
_RARELY: Final = (*_OFTEN, "key", "auth", "session", "sid", "pass")
# ... and not in these compounds, where a key is no credential ("duplicate key: <sha256>").
_NEVER: Final = ("cache", "duplicate", "foreign", "object", "primary", "public", "registry", "sort")
# In a query or a form, a parameter of exactly this name is a credential.
_PARAMETER: Final = (
    "(?:key|auth|token|sig|signature|hmac|session|sess|sid|pass|pw|code|jwt|creds|credentials?)"
)


def _ends(*names: str) -> str:
    r"""Build the test "the word just read ends with one of these names".

    Lookbehinds need a fixed width, hence one for every spelling.
    """
    plain = (name.replace(".", r"\.").replace("#", r"\d") for name in names)
    spellings = dict.fromkeys(name.replace("?", gap) for name in plain for gap in ("", r"[-_\ ]"))
    return "(?:" + "|".join(f"(?<={spelling})" for spelling in spellings) + ")"


def _is(*names: str) -> str:
    """Build the test "the last part of the word just read is one of these names"."""
    return "(?:" + "|".join(f"(?<=(?<![a-z0-9]){name})" for name in names) + ")"


# --- building blocks (verbose syntax, case-insensitive) -----------------------------------------

_BLANKS: Final = r"[^\S\n]*+"
# What may stand between a name and its `=` or `:`, as in {"name": ..}, {\"name\": ..}, env['name']=
_CLOSE: Final = rf"""[\\"'\]]{{0,6}}+ {_BLANKS}"""
_EQUALS: Final = rf"{_CLOSE} (?:=>|:=|==?|%3D) {_BLANKS}"
_COLON: Final = rf"{_CLOSE} :(?!//) {_BLANKS}"
_EITHER: Final = rf"(?: {_EQUALS} | {_COLON} )"
_STRONG: Final = rf"""(?: {_EQUALS} | \\*+["']{_BLANKS} : {_BLANKS} )"""
# Where a word starts. After `/`, `\` and `@` it is part of a path or an address and needs a `=`
# (`/run/secret: denied` stays); but a line end may be spelled out as `\n` before it.
_START: Final = (
    r"(?: (?<![\w.\-/\\@]) | (?<=\\[nrt]) | (?<=[/\\@]) (?=[\w.-]++ [^\S\n]*+ (?:=|%3D)) )"
)
# A word before `=` or `:`. Checked first, because it turns nearly all words down.
_WORD: Final = rf"[\w.-]++ (?= {_CLOSE} (?:[:=]|%3D))"
_OFTEN_NAME: Final = rf"{_START} {_WORD} {_is(*_OFTEN)}"
_NO_CREDENTIAL: Final = "".join(rf"(?<!{word}[-_\ ]key)" for word in _NEVER)
_RARE_NAME: Final = rf"{_START} {_WORD} {_is(*_RARELY)} {_NO_CREDENTIAL}"
# A parameter that is called `misp_key` is one as well; plain `key` may be anything.
_SECRET_NAME: Final = re.compile(
    rf"""[\w.\ -]++ (?: {_ends(*_SURE, *_HEADERS)} | {_is(*_OFTEN, "auth", "pass")}
        | (?<=[a-z0-9][-_]key) {_NO_CREDENTIAL} )""",
    re.VERBOSE | re.IGNORECASE,
)
# A value that is itself the name of the next pair must not be taken: its own value would stay.
_ANY_NAME: Final = (
    rf"""[bu]?+ \\*+ ["']?+ {_WORD} (?: {_ends(*_SURE, *_HEADERS)} | {_is(*_RARELY)} )"""
)
_NO_NAME: Final = rf"""(?! {_ANY_NAME} {_CLOSE} (?: : | (?<=\s)= | =[>=]?+ [\s\\"'] ) )"""
# Words that say that there is no value are worth seeing (`api_key=None`).
_SOME: Final = r"(?! (?:none|null|nil|true|false) (?![^\s,;&)\]}]) )"
# An opening quote, as in '..', b"..", \"..\" (JSON in JSON) and ["..."] (lists of header values).
_OPEN: Final = r"""(?: [\[(] \s?+ )?+ [bu]?+ (?P<q>\\*+["'])"""
# A quote right after `name=` inside opens another value; it can't be the closing one.
_QUOTED: Final = r"""(?: (?!(?P=q)) \\?[^\n]
    | (?: (?<=[a-z_][=:]) | (?<=[a-z_][=:][ ]) ) (?P=q) (?= [^\s,;)}\]] ) )++"""
# What ends an unquoted value even if it belongs to its alphabet: quotes and line ends spelled out.
_STOP: Final = r"""(?: [\s"'] | <[/a-z!] | \\["'rn] | \Z )"""
# An unquoted value. `&`, `;` and `,` end it only before another `name=`, since a password may hold
# them. Closing punctuation of the sentence around it is not part of it.
_BARE: Final = rf"""(?:
      [^\s"'<>&;,.:)}}\\]
    | [&;,] (?! \s?+ [\w.%\[\]-]{{1,64}}+ ["']? [=:] ) (?! [&;,.:)}}>]{{0,3}}+ {_STOP} )
    | [.:)}}>] (?! [&;,.:)}}>]{{0,3}}+ {_STOP} )
    | < (?![/a-z!])
    | \\ (?!["'rn])
    | (?<=\w) (?<!\W[bu]) ["'] (?=\w)
)++"""
# One long run of letters and digits that is not a CVE or STIX id, a Windows SID or a path.
_OPAQUE: Final = rf"""(?! cve- | s-1- | / | [\w-]{{1,64}}?-- )
    (?= [\w+/=~-]{{0,256}}?[a-z0-9]{{16}} ) (?= [\w+/=~-]{{0,256}}?\d )
    (?= [\w+/=~-]{{0,256}}?[a-z] )
    [\w+/=~-]{{16,}}+ (?= [<>,;&)\]}}] | \.(?!\S) | {_STOP} )"""
# A piece of a header's value, and all the rest of it; quoted parts (realm="a b") belong to it.
_PIECE: Final = r"""(?: =\\*+"[^"\n]*+" | [^\s"'\\] | \\(?!["'rn]) )++"""
_REST: Final = r"""(?: =\\*+"[^"\n]*+" | [^\n"'\\] | \\(?!["'rn]) | (?<=\w)'(?=[\w%;]) )++"""
# A scheme and its credentials, or credentials alone (MISP); with a comma, a list of parameters
# (Digest) up to the end of the line.
_CREDENTIALS: Final = rf"""(?! \[redacted\] (?: [,;)\]}}] | {_STOP} ) )
    (?: [a-z][\w-]{{0,19}}+ [^\S\n]++ (?! {_ANY_NAME} {_CLOSE} (?: : | =[\s'] ) )
        (?!\w{{2,10}}://) )?
    {_PIECE} (?: (?<=,) {_REST} )?"""
# Where a well-known token may start: not inside a word, but a line end or a percent-encoded
# character may come before it. The second is for tokens whose own alphabet has `-` and `_`.
_EDGE: Final = r"(?: (?<![A-Za-z0-9]) | (?<=\\[nrt]) | (?<=%[0-9A-Fa-f]{2}) )"
_WIDE_EDGE: Final = r"(?: (?<![\w-]) | (?<=\\[nrt]) | (?<=%[0-9A-Fa-f]{2}) )"


def _quoted(name: str, separator: str) -> str:
    """Build the rule "name, separator, value in quotes"."""
    return rf"(?P<keep> {name} {separator} {_NO_NAME} {_OPEN} ) {_QUOTED}"


def _bare(name: str, separator: str, value: str = _BARE) -> str:
    """Build the rule "name, separator, value without quotes"."""
    no_quote = _OPEN.replace("?P<q>", "?:")
    return rf"(?P<keep> {name} {separator} {_NO_NAME} {_SOME} (?! {no_quote} ) ) {value}"


# --- the rules ----------------------------------------------------------------------------------
# What a rule finds is replaced by its group `keep` and the marker. Before the rule stand its hints:
# a text that holds none of them (in small letters) can't match, and most messages hold few. The
# order matters: what can be told by its own shape goes first, so that `password: Bearer x` can't
# take `Bearer` for the value.

# What every name in a list has at least one of.
_SURE_HINTS: Final = ("key", "pass", "pwd", "secret", "token", "sess", "amz", "goog")
_OFTEN_HINTS: Final = ("token", "cred", "jwt")
_PREFIXES: Final = (
    *("akia", "asia", "abia", "acca", "gho_", "ghp_", "ghr_", "ghs_", "ghu_", "github_pat_", "gl"),
    *("xox", "xapp-", "aiza", "ya29.", "gocspx-", "_live_", "_test_", "whsec_", "npm_", "pypi-"),
    *("hf_", "sg."),
)

_RULES: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    # PEM private keys (RFC 7468), with line ends as such or spelled out. Without its end, a key
    # goes up to the end of the text.
    (
        ("private key",),
        r"""(?P<keep>) -----BEGIN[ A-Z0-9]{0,40}PRIVATE[ ]KEY[ A-Z]{0,10}-----
            (?s: .*?-----END[ A-Z0-9]{0,60}----- | .* )""",
    ),
    # Tokens that tell by their prefix: AWS, GitHub, GitLab, Slack, Google, Stripe, npm, PyPI,
    # Hugging Face, SendGrid.
    (
        _PREFIXES,
        rf"""(?P<keep>) (?-i: {_EDGE} (?:
              (?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{{16}}(?![A-Za-z0-9])
            | gh[opsur]_[A-Za-z0-9]{{20,}}+ | github_pat_[A-Za-z0-9_]{{20,}}+
            | gl(?:pat|cbt|dt|ft|imt|ptt|rt|soat)-[\w-]{{16,}}+
            | (?:xox[a-z]|xapp)-[A-Za-z0-9-]{{10,}}+
            | AIza[\w-]{{30,}}+ | ya29\.[\w-]{{20,}}+ | GOCSPX-[\w-]{{20,}}+
            | [rs]k_(?:live|test)_[A-Za-z0-9]{{10,}}+ | whsec_[A-Za-z0-9]{{20,}}+
            | npm_[A-Za-z0-9]{{30,}}+ | pypi-AgE[\w-]{{16,}}+ | hf_[A-Za-z0-9]{{30,}}+
            | SG\.[\w-]{{16,64}}+\.[\w-]{{16,}}+
            ))""",
    ),
    # OpenAI and Anthropic keys. `sk-` also begins Slovak domain and file names, which are in
    # small letters or go on with a dot.
    (
        ("sk-",),
        rf"""(?P<keep>) (?-i: {_WIDE_EDGE} sk- (?= [\w-]{{0,256}}?(?:[A-Z0-9]|[a-z]{{30}}) )
            [\w-]{{20,}}+ (?! \[?\.\]?[a-z] ) )""",
    ),
    # JSON web tokens (RFC 7519 section 3): either the header begins as {"alg" and the like do, or
    # the second part is an object too. A base64 label of a tunnelling domain is neither.
    (
        ("eyj",),
        rf"""(?P<keep>) (?-i: {_WIDE_EDGE} eyJ (?:
              (?:hbG|0eX|raW|lbm|jdH|4NX|6aX|qa3|hdW)[\w-]*+\.[\w-]++
            | [\w-]*+\.(?: eyJ[\w-]++ | [\w-]{{20,}}+ )
            ) (?: \.[\w-]*+ ){{0,3}} )""",
    ),
    # Userinfo of a URL (RFC 3986 section 3.2.1), which ends at the last `@` before the path; also
    # with `/` escaped as PHP's JSON has it. Unlike in the RFC, a password may hold `/`, `?` and
    # `#` if what follows the colon is not a port.
    (
        ("@",),
        r"""(?P<keep> (?<=://) | (?<=:\\/\\/) ) (?! @ | \[[\d.:a-f]*+\] )
            [^\s/?\#:@"'<>,()]*+
            (?: : (?! \]?\d{1,5} (?![^\s/?\#"',;)\]}<>\\]) )
                (?: [^\s/?\#@"<>]*+ (?=@) | (?: (?!://)[^\s@"<>] )*+ ) )?
            (?=@) (?: @ [^\s/?\#@"'<>]*+ (?=@) )*+""",
    ),
    # The same in a URL that is percent-encoded as a parameter of another.
    (
        ("%40",),
        r"""(?P<keep> (?<=%3A%2F%2F) ) (?: (?!%2F|%3F|%23|%40)[^\s/?\#&"'<>] )++ (?=%40)""",
    ),
    # Credentials without the name of their header, if they don't read like a word.
    (
        ("bearer",),
        rf"""(?P<keep> (?<![\w-]) bearer (?: [^\S\n]++ | %20 ) {_NO_NAME} )
            (?-i: (?= [\w.~+/-]{{0,256}}? (?: \d | = | [a-z][A-Z] ) ) ) [\w.~+/=-]{{8,}}+""",
    ),
    (
        ("basic",),
        rf"""(?P<keep> (?<![\w-]) basic (?: [^\S\n]++ | %20 ) {_NO_NAME} )
            (?-i: (?= [A-Za-z0-9+/]{{0,256}}? (?: \d | = )
                | (?: [A-Za-z]{{0,32}}?[a-z][A-Z] ){{2}} )
            [A-Za-z0-9+/]{{8,}}+ =*+ (?!\w) )""",
    ),
    # Arguments of requests and its like: auth=('user', 'password'), cookies={'sid': '...'}; and
    # what a cookie jar prints.
    (
        ("auth", "cookie"),
        rf"""(?P<keep> (?<![\w.-]) (?:auth|cookies?) {_BLANKS} = {_BLANKS} [a-z]{{0,20}} [({{] )
            [^(){{}}\n]++""",
    ),
    (
        ("<cookie",),
        r"""(?P<keep> <Cookie[ ][^\s=<>]{1,128}+= ) [^\s<>]++""",
    ),
    # A header as a pair: ('Authorization', 'Bearer x'), {"name": "Cookie", "value": "x"}.
    (
        ("authorization", "cookie", *_SURE_HINTS),
        rf"""(?P<keep> (?: \(\s?[bu]? | "name":\s? ) ["'] [\w.-]++ {_ends(*_SURE, *_HEADERS)} ["']
            ,\s? (?: "value":\s? )? [bu]? (?P<q>["']) ) {_QUOTED}""",
    ),
    # An element of XML.
    (
        _SURE_HINTS,
        rf"""(?P<keep> < [\w.:-]++ (?: {_ends(*_SURE)} | {_is(*_OFTEN)} ) > ) [^<\n]++""",
    ),
    # Authorization with a list of parameters in quotes, as Digest has it (RFC 7616 section 3.4).
    (
        ("authorization",),
        _bare(
            rf"{_START} {_WORD} {_ends('authorization')}",
            _EITHER,
            rf"""(?= [a-z][\w-]{{0,19}}+ [^\S\n]++ [\w-]{{1,64}}+ =\\*+" ) {_REST}""",
        ),
    ),
    # Names of secrets with values in quotes, in whatever notation: JSON, reprs, keyword arguments.
    # All of them before those without quotes, which can't tell where such a value ends.
    (
        ("authorization", "cookie", *_SURE_HINTS),
        _quoted(rf"{_START} {_WORD} {_ends(*_SURE, *_HEADERS)}", _EITHER),
    ),
    (
        _OFTEN_HINTS,
        _quoted(_OFTEN_NAME, _STRONG),
    ),
    # Command lines: `curl -u user:password`, `--api-key ...`.
    (
        ("-u",),
        r"""(?P<keep> (?<![^\s"'=]) (?: -u | --user | --proxy-user ) [^\S\n]++ ["']?+ )
            (?! \w{1,10}:// ) [^\s:"'@/]++ : [^\s"']++""",
    ),
    (
        ("-",),
        rf"""(?P<keep> (?<![^\s"'=]) --?[a-z][\w-]*+ (?: {_ends(*_SURE)} | {_is(*_OFTEN)} )
            [^\S\n]++ (?!-) {_NO_NAME} {_SOME} (?: {_OPEN} )?+ ) (?(q) {_QUOTED} | {_BARE} )""",
    ),
    # Authorization and Proxy-Authorization, any other scheme (RFC 9110 sections 11.6.2 and 11.7.2).
    (
        ("authorization",),
        _bare(rf"{_START} {_WORD} {_ends('authorization')}", _EITHER, _CREDENTIALS),
    ),
    # Cookie and Set-Cookie (RFC 6265 section 4): up to the end of the line. "Cookie: T1539" is
    # not one.
    (
        ("cookie",),
        rf"""(?P<keep> {_START} {_WORD} {_ends("cookie")} {_EITHER} )
            (?= [^\s=;,"']{{1,128}}= ) {_REST}""",
    ),
    # Names of secrets with values without quotes.
    (
        _SURE_HINTS,
        _bare(rf"{_START} {_WORD} {_ends(*_SURE)}", _EITHER),
    ),
    (
        _OFTEN_HINTS,
        _bare(_OFTEN_NAME, _STRONG),
    ),
    # Parameters of a query, a fragment or a form (`;` separates as well), also of an encoded URL.
    (
        ("=", "%3d"),
        rf"""(?P<keep> (?: [?&;\#] | %3F | %26 | %3B | %23 | \\u0026 ) {_PARAMETER} (?:=|%3D)
            {_SOME} ) {_BARE}""",
    ),
    (
        ("&",),
        rf"""(?P<keep> (?<![\w.%/-]) {_PARAMETER} = (?= [^\s&]{{1,512}}& [\w.%\[\]-]{{1,64}}= ) )
            {_BARE}""",
    ),
    # Everyday words before something that only a machine would write.
    (
        ("key", "auth", "sid", *_SURE_HINTS, *_OFTEN_HINTS),
        rf"(?P<keep> {_RARE_NAME} {_EITHER} (?: {_OPEN} )?+ ) {_OPAQUE}",
    ),
)


# What may be the percent-encoded name of a parameter, and what is the name of a secret.
_ENCODED: Final = r"(?<![\w.~%+-]) (?= [\w.~+-]{0,96}+% ) [\w.~%+-]{1,96}+ (?==)"
_SECRET: Final = rf"[\w.-]++ (?: {_ends(*_SURE)} | {_is(*_OFTEN)} ) | {_PARAMETER}"


@cache
def _compiled(rule: str) -> re.Pattern[str]:
    """Compile a rule; at its first use, because all of them take longer than an import should."""
    return re.compile(rule, re.VERBOSE | re.IGNORECASE)


# --- cleaning -----------------------------------------------------------------------------------

# Zero-width and formatting characters, bidi controls (Unicode TR 9) and variation selectors: not
# to be seen, but enough to split a word. `\r` goes too: it overwrites a line on a terminal.
_INVISIBLE: Final = (
    "\r\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb\U000e0000-\U000e01ef"
)
# Escape sequences (ECMA-48 section 5): CSI with parameters or with a final letter that is used
# alone, strings such as OSC up to their end, character sets; of anything else just the escape
# itself, so that the first letter of a name is never taken for the end of a sequence.
_ESCAPES: Final = (
    r"(?:\x1b\[|\x9b)(?:[0-?]++[!-/]*+[@-~]?+|[!-/]++[@-~]?+|[@A-HJKm]?+)"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])(?:[^\x07\x1b\x9c\n]*+(?:\x07|\x1b\\|\x9c))?+"
    r"|\x1b[()*+][0-9A-B]|\x1b"
)


@cache
def _cleaners() -> tuple[tuple[re.Pattern[str], str], ...]:
    """Compile what `_clean` does; invisible characters first, as they may sit in an escape."""
    return (
        (re.compile(f"[{_INVISIBLE}]"), ""),
        (re.compile(_ESCAPES), ""),
        (re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]"), " "),
        (re.compile("[\u2028\u2029]"), "\n"),
        (re.compile("[\ud800-\udfff]"), "\ufffd"),
    )


def _clean(text: str) -> str:
    """Remove control characters, escape sequences, invisible characters and surrogates."""
    if text.isascii() and text.isprintable():
        return text
    for pattern, replacement in _cleaners():
        text = pattern.sub(replacement, text)
    return text


def _last_break(text: str) -> int:
    """Return where the last, possibly unfinished, token of a text begins.

    A token ends at white space or with a JSON string; no secret has either inside.
    """
    found = re.match(r'(?s:.*)(?:\s|"[,}\]])', text)
    return found.end() if found else 0


def _shorten(text: str, limit: int) -> str:
    """Cut a redacted text to the limit, but before a marker rather than inside of it."""
    if len(text) <= limit:
        return text
    end = limit - len(_CUT)
    marker = text.rfind(_MARKER, 0, end + len(_MARKER) - 1)
    if 0 <= marker < end < marker + len(_MARKER):
        end = marker
    return text[:end] + _CUT


def _decode_name(found: re.Match[str]) -> str:
    """Return a parameter's name without percent-encoding if it names a secret, else as it is.

    Decodes twice, for a URL in a URL.
    """
    name = found[0]
    for _ in range(2):
        name = re.sub(r"%([0-7][0-9A-Fa-f])", lambda code: chr(int(code[1], 16)), name)
    return name if _compiled(_SECRET).fullmatch(name) else found[0]


def _apply_rules(text: str) -> str:
    """Apply all rules once; an ellipsis at the end is the mark of a cut, not part of a value."""
    body = text.removesuffix(_CUT)
    cut = text[len(body) :]
    if "%" in body:
        body = _compiled(_ENCODED).sub(_decode_name, body)
    folded = body.casefold()
    for hints, rule in _RULES:
        if any(hint in folded for hint in hints):
            body = _compiled(rule).sub(rf"\g<keep>{_MARKER}", body)
    return body + cut


def redact(text: str, limit: int = 1024) -> str:
    """Take the secrets out of a text, make it harmless to print and bound its length.

    Secrets are replaced by `[redacted]`, which tells nothing about them: userinfo in URLs
    (RFC 3986 section 3.2.1), the values of `Authorization` (RFC 9110 section 11.6), cookie
    (RFC 6265) and API-key headers, of parameters and pairs with the name of a secret, private
    keys and well-known kinds of tokens. Indicators (domains, URLs, addresses, hashes, file names,
    CVE and STIX ids) stay, also when such a name is part of them. Redacting twice changes nothing.

    Control characters become spaces, except for line ends and tabs; escape sequences and
    invisible characters go, lone surrogates become U+FFFD.

    Args:
        text: Any text, such as the message of an exception.
        limit: The most characters to return; a text that is cut ends in `…`. 1024 by default.

    Returns:
        The text without secrets, which always encodes as UTF-8.

    Example:
        >>> redact("403 for https://bob:pw@taxii.example/?api_key=abc (auth-paypal.example)")
        '403 for https://[redacted]@taxii.example/?api_key=[redacted] (auth-paypal.example)'
    """
    if limit <= 0:
        return ""
    window = _WINDOW + limit
    if len(text) > window:
        # Half a secret can't be told from a word, so the token that is cut goes as a whole.
        text = _clean(text[:window])
        text = text[: _last_break(text)] + _CUT
    else:
        text = _clean(text)
    for _ in range(_ROUNDS):
        result = _shorten(_apply_rules(text), limit)
        if result == text:
            return text
        text = result
    # A text made to change with every round: what it holds can't be told.
    return _shorten(_MARKER, limit)


def names_a_secret(name: str) -> bool:
    """Say whether what has this name, such as a parameter or a header, should be kept to oneself.

    Args:
        name: Of any case, with `_`, `-` or `.` between its words; a plural counts too.

    Example:
        >>> [names_a_secret(name) for name in ("api_key", "passwords", "url", "primary_key")]
        [True, True, False, False]
    """
    short = name[:200].strip()
    return any(_SECRET_NAME.fullmatch(one) for one in (short, short.removesuffix("s")))


def clean_name(value: object, limit: int = 200) -> str:
    r"""Make a value fit for a name or a label: one clean line of bounded length.

    Runs of white space become one space; control characters, escape sequences, invisible
    characters and surrogates go as in `redact`. Nothing is redacted.

    Args:
        value: What to name: mostly a string, else its `str()`. If that fails, the name of its type
            in angle brackets stands for it.
        limit: The most characters to return; a name that is cut ends in `…`. 200 by default.

    Returns:
        The name, which may be empty.

    Example:
        >>> clean_name("urlhaus\n  \x1b[31mrecent\x1b[0m ")
        'urlhaus recent'
    """
    if (
        type(value) is str
        and len(value) <= limit
        and value.isascii()
        and value.isprintable()
        and "  " not in value
        and value[:1] != " "
        and value[-1:] != " "
    ):
        return value
    try:
        text = str(value)
    except Exception:  # noqa: BLE001 - a label must not fail because of what it names
        text = f"<{type(value).__name__}>"
    # Cleaning only shortens, so a part of a huge text has to do.
    name = " ".join(_clean(text[: _WINDOW + max(limit, 0)]).split())
    return name if len(name) <= limit else name[: max(limit - len(_CUT), 0)] + _CUT[: max(limit, 0)]
