"""Masks for what a credit reference must not tell the teacher: how an attempt was judged, credentials, and the literal answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

PLACEHOLDER = "[masked]"

_LABELS = re.compile(
    r"\b(?:(?:un)?success(?:es|ful|fully)?|succeed(?:s|ed|ing)?|fail(?:s|ed|ing|ures?)?|(?:in)?correct(?:ly)?|wrong(?:ly)?"
    r"|verdict\s*[:=]?\s*\w+"
    r"|(?:reward|score|advantage)s?\s*(?:[:=]|is|was|of)?\s*[-+]?\d+(?:\.\d+)?"
    r"|(?:attempt|rollout|trajectory|sample|response)s?\s*#?\d+(?:(?:,\s*|\s*(?:and|&|-)\s*)#?\d+)*)\b",
    re.IGNORECASE,
)
_CREDENTIALS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
    r"|\bAuthorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?[^\s\"',;}]+"
    r"|\bBearer\s+[\w.~+/=-]{8,}"
    r"|\b(?:sk|pk|rk)[-_][\w-]{8,}|\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}|\bhf_\w{16,}|\bxox[abprs]-[\w-]{8,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*",
    re.IGNORECASE | re.DOTALL,
)
_NAMED_SECRET = re.compile(
    r"(\b[\w-]*(?:api[_-]?key|access[_-]?key|secret|token(?!s)|passw(?:or)?d|passphrase|pwd)[\w-]*[\"']?\s*(?:[:=]|\bis\b)\s*)"
    r"(\"[^\"]*\"|'[^']*'|[^\s,;}\"']+)",
    re.IGNORECASE,
)
# A sign counts unless it stands behind a value ("12-7" ends in 7). Thousands are grouped by , {,} \, or a narrow space.
_NUMBER = (
    r"(?<![\w.])(?:(?<![\w.)\]}])[-+\u2212])?"
    r"(?:\d{1,3}(?:(?:,|\{,\}|\\,|[\u00a0\u2009\u202f])\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?!\d)"
)
_FRACTION = (
    r"[-\u2212]?\\[dt]?frac\s*(?:\{\s*[-\u2212]?\d+\s*\}|\d)\s*(?:\{\s*\d+\s*\}|\d)"
    r"|(?<![\w./])(?:(?<![)\]}])[-\u2212])?\d+\s*/\s*\d+(?![\w/])"
)
_DECORATION = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}|\\[!;: ]|\^\{?\\circ\}?|\\?%|\\?\$|\\left|\\right|\\boxed")
_DROPPED = {"\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ ", "$", "\\$"}
_GLUE = r"(?:\s|\\[!,;: ]|\\left|\\right|\$|\*)*"
_SPELLINGS = {
    "{": r"[{(]?", "}": r"[})]?", "\\sqrt": r"(?:\\?sqrt|√)", "\\pi": r"(?:\\?pi|π)", "\\infty": r"(?:\\?infty|∞|infinity)",
    "-": "[-\u2212]",
}  # fmt: skip


def mask(text: str, answer: str) -> str:
    """The text with credentials, the answer in any of its spellings, and labels replaced by PLACEHOLDER.

    Numbers are compared by value and whole: of answer 12, "12", "12.0" and "$12" go; "123", "0.12", "-12" and "x12" stay.
    """
    text = _NAMED_SECRET.sub(rf"\1{PLACEHOLDER}", _CREDENTIALS.sub(PLACEHOLDER, text))
    value = _answer_value(answer)
    if value is None:
        for pattern in _literals(answer):
            text = pattern.sub(PLACEHOLDER, text)
    else:
        forms = _NUMBER if value.denominator == 1 else f"{_FRACTION}|{_NUMBER}"  # 24/2 is a step towards 12, not its spelling
        text = re.sub(forms, lambda m: PLACEHOLDER if _value(m[0]) == value else m[0], text)
    return _LABELS.sub(PLACEHOLDER, text)


def _value(number: str) -> Fraction | None:
    """The value of a match of _NUMBER or _FRACTION."""
    plain = re.sub(r"\{,\}|\\,|[,\u00a0\u2009\u202f]", "", number).replace("\u2212", "-")
    try:
        if "frac" in plain:
            sign = -1 if plain.startswith("-") else 1
            digits = re.findall(r"-?\d+", plain.removeprefix("-"))
            top, bottom = digits if len(digits) == 2 else digits[0]  # \frac34
            return sign * Fraction(int(top), int(bottom))
        return Fraction(re.sub(r"\s", "", plain))
    except (ValueError, ZeroDivisionError):  # also digits beyond Python's limit for integers
        return None


def _answer_value(answer: str) -> Fraction | None:
    """The number that an answer is, units and LaTeX dress aside; None for another kind of answer."""
    plain = re.sub(r"^\s*\w+\s*=", "", _DECORATION.sub("", answer)).strip()
    plain = plain[1:-1].strip() if plain.startswith("{") and plain.endswith("}") else plain
    found = re.match(f"{_FRACTION}|{_NUMBER}", plain)
    rest = plain[found.end() :] if found else ""
    return _value(found[0]) if found and re.fullmatch(r"(?:\s*[A-Za-z]+)*\.?\s*", rest) else None


def _literals(answer: str) -> Iterator[re.Pattern[str]]:
    """The answer's text, and the same with \\frac{a}{b} as a/b, whatever LaTeX spacing lies between its parts."""
    inner = re.sub(r"^\s*\\boxed\s*\{(.*)\}\s*$", r"\1", answer, flags=re.DOTALL)
    for text in dict.fromkeys((inner, re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", inner))):
        parts = [p for p in re.findall(r"\\[A-Za-z]+|\\.|\w+|[^\w\s]", text) if p not in _DROPPED]
        if not any(re.search(r"\w", p) for p in parts):
            continue
        flags = re.IGNORECASE if len("".join(parts)) > 1 else re.NOFLAG  # an answer A is no article a
        before = r"(?<!\w)(?<!\d[.,])" if re.match(r"\w", parts[0]) else ""
        yield re.compile(before + _GLUE.join(map(_spelling, parts)) + r"(?!\w)(?![.,]\d)", flags)


def _spelling(part: str) -> str:
    if part in ("\\frac", "\\dfrac", "\\tfrac"):
        return r"\\[dt]?frac"
    if part in _SPELLINGS:
        return _SPELLINGS[part]
    return r"\\?" + re.escape(part[1:]) if part.startswith("\\") else re.escape(part)
