"""`mask_pii`: what gives somebody away, put behind a placeholder of its kind.

Patterns find candidates, checks decide: a card number's last digit (Luhn), an IBAN's remainder (ISO 13616),
an address's range. Precision goes first: a version, a date, an ISBN or a decimal number is left alone, and so
is a number in a national notation that no prefix, brackets or word shows to be a telephone's.
"""

import ipaddress
import re
from collections.abc import Callable

from data.curation.base import Edges, Outcome
from data.curation.config import MaskPII

Recognizer = Callable[[re.Match[str]], str | None]

EMAIL = re.compile(
    r"(?<![\w.%+@-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-]|\.\w|@)", re.ASCII
)
CREDENTIALS = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{1,20}://)[^\s/@:<>]{1,128}:[^\s/@<>]{1,256}@"
)
SECRET = re.compile(
    r"(?<![A-Za-z0-9_-])(?:AKIA[0-9A-Z]{16}|gh[oprsu]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,100}"
    r"|glpat-[A-Za-z0-9_-]{20,64}|xox[abprs]-[A-Za-z0-9-]{20,250}|sk-[A-Za-z0-9_-]{20,200}|AIza[0-9A-Za-z_-]{35}"
    r"|hf_[A-Za-z]{34}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?![A-Za-z0-9_-])"
    r"|-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----.{0,10000}?-----END (?:[A-Z]+ ){0,3}PRIVATE KEY-----",
    re.ASCII | re.DOTALL,
)
IBAN = re.compile(
    r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])", re.ASCII
)
CARD = re.compile(
    r"(?<![\w.,/+-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3[47]\d{2}([ -]?)\d{6}\2\d{5}|\d{13,19})"
    r"(?![\w/+-]|[.,]\d)",
    re.ASCII,
)
IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)", re.ASCII)
IPV6 = re.compile(
    r"(?<![\w:.])(?=[0-9A-Fa-f:]{0,39}:[0-9A-Fa-f:]{0,39}:)[0-9A-Fa-f:]{6,39}(?![\w:]|\.\d)", re.ASCII
)
PHONE = re.compile(
    # +49 30 1234567: E.164 has 15 digits at most
    r"(?<![\w+.,-])\+[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{1,12}){1,6}(?![\w+-]|[.,]\d)"
    # (212) 555-0123, 212-555-0123: North America
    r"|(?<![\w+.,(/-])(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[.-]\d{4}(?![\w+-]|[.,]\d)"
    # 030 1234567: national, where a word before it says what it is
    r"|(?<![\w+.,/-])\(?0\d{1,4}\)?(?:[ ./-]{1,3}\d{2,8}){1,4}(?![\w-]|[.,]\d)",
    re.ASCII,
)
CALL = re.compile(r"\b(?:tel|telephone|phone|mobile|mobil|fax|telefon|call)[.:]{0,2} ?$", re.IGNORECASE)
# A number of four parts is a version after these.
VERSION = re.compile(
    r"(?:\bv|version|release|revision|build|section|chapter|[=<>~^@])[ :.=]{0,2}$", re.IGNORECASE
)
IBAN_LENGTHS = {
    **dict(AD=24, AE=23, AL=28, AT=20, AZ=28, BA=20, BE=16, BG=22, BH=22, BR=29, BY=28, CH=21, CR=22, CY=28),
    **dict(CZ=24, DE=22, DK=18, DO=28, EE=20, EG=29, ES=24, FI=18, FO=18, FR=27, GB=22, GE=22, GI=23, GL=18),
    **dict(GR=27, GT=28, HR=21, HU=28, IE=22, IL=23, IQ=23, IS=26, IT=27, JO=30, KW=30, KZ=20, LB=28, LC=32),
    **dict(LI=21, LT=20, LU=20, LV=21, LY=25, MC=27, MD=24, ME=22, MK=19, MR=27, MT=31, MU=30, NL=18, NO=15),
    **dict(PK=24, PL=28, PS=29, PT=25, QA=29, RO=24, RS=22, SA=24, SC=31, SE=24, SI=19, SK=24, SM=27, ST=25),
    **dict(SV=28, TL=23, TN=24, TR=26, UA=29, VA=22, VG=24, XK=20),
}
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - 16) : match.start()]


def luhn(digits: str) -> bool:
    """Say whether the last digit checks the others (ISO/IEC 7812-1)."""
    doubled = (int(d) * (1 + place % 2) for place, d in enumerate(reversed(digits)))
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def iban(text: str) -> bool:
    """Say whether this is an IBAN of its country's length with a remainder of 1 modulo 97 (ISO 13616)."""
    text = text.replace(" ", "")
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


def _card(match: re.Match[str]) -> str | None:
    digits = _digits(match[0])
    # Mastercard's second range begins with 2; no network begins with 0, 1, 7, 8 or 9, as ISBN-13 does.
    begins = digits[0] in "3456" or 2221 <= int(digits[:4]) <= 2720
    return "<CARD>" if begins and 13 <= len(digits) <= 19 and luhn(digits) else None


def _iban(match: re.Match[str]) -> str | None:
    # The next word may begin in capitals too: take what the country's length says.
    length = IBAN_LENGTHS.get(match[0][:2], 0)
    ends = [place for place, character in enumerate(match[0], 1) if character != " "]
    if not 0 < length <= len(ends):
        return None
    place = ends[length - 1]
    rest = match[0][place:]
    fits = rest[:1] in ("", " ") and iban(match[0][:place])
    return "<IBAN>" + rest if fits else None


def _ipv4(match: re.Match[str]) -> str | None:
    parts = match[0].split(".")
    if any(len(part) > 1 and part[0] == "0" for part in parts) or any(int(part) > 255 for part in parts):
        return None
    before = _before(match)
    if VERSION.search(before) or _heading(match, parts, before):
        return None
    # Private, loopback and documentation addresses are nobody's.
    return "<IP>" if ipaddress.ip_address(match[0]).is_global else None


def _heading(match: re.Match[str], parts: list[str], before: str) -> bool:
    """Say whether this is `1.2.3.4 Title`: at a line's beginning, small numbers, then a capital."""
    begins = not before or before.rsplit("\n", 1)[-1].strip(" #") == ""
    small = all(int(part) < 32 for part in parts)
    return begins and small and re.match(r" +[A-Z]", match.string[match.end() : match.end() + 4]) is not None


def _ipv6(match: re.Match[str]) -> str | None:
    text = match[0]
    tail = ":" if text.endswith(":") and not text.endswith("::") else ""  # a colon of the sentence
    try:
        address = ipaddress.IPv6Address(text.removesuffix(tail))
    except ValueError:
        return None
    return "<IP>" + tail if address in GLOBAL_UNICAST and address.is_global else None


def _phone(match: re.Match[str]) -> str | None:
    digits = _digits(match[0])
    if match[0].lstrip("(").startswith("0") and not CALL.search(_before(match)):
        return None
    return "<PHONE>" if (8 if match[0].startswith("+") else 7) <= len(digits) <= 15 else None


# In this order: a URL's password may look like the beginning of an address, a card like a telephone.
PATTERNS: dict[str, tuple[tuple[re.Pattern[str], Recognizer], ...]] = {
    "credentials": ((CREDENTIALS, lambda match: f"{match[1]}<CREDENTIALS>@"),),
    "secret": ((SECRET, lambda match: "<SECRET>"),),
    "email": ((EMAIL, lambda match: "<EMAIL>"),),
    "iban": ((IBAN, _iban),),
    "card": ((CARD, _card),),
    "ip": ((IPV4, _ipv4), (IPV6, _ipv6)),
    "phone": ((PHONE, _phone),),
}
# A text without these characters holds nothing of the kind; most have no `@`.
NEEDED = {"credentials": "://", "email": "@"}


class MaskPIIStep:
    """Masks the kinds that were asked for and counts them."""

    edges: dict[str, Edges] = {}

    def __init__(self, config: MaskPII):
        self.kinds = tuple(kind for kind in PATTERNS if kind in config.kinds)

    def apply(self, text: str) -> Outcome:
        """Return the masked text; nothing is dropped."""
        counts = {}
        for kind in self.kinds:
            if NEEDED.get(kind, "") in text:
                text, counts[kind] = mask(text, kind)
        return Outcome(text, counts={kind: count for kind, count in counts.items() if count})


def mask(text: str, kind: str) -> tuple[str, int]:
    """Return the text with every find of one kind replaced, and how many there were."""
    found = 0
    for pattern, decide in PATTERNS[kind]:

        def replace(match: re.Match[str], decide: Recognizer = decide) -> str:
            nonlocal found
            placeholder = decide(match)
            found += placeholder is not None
            return match[0] if placeholder is None else placeholder

        text = pattern.sub(replace, text)
    return text, found
