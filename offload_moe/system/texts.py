"""Text from outside: decoding of bytes, and checks for characters that cannot be encoded."""

import codecs
from pathlib import Path

from offload_moe.errors import ConfigError

# The longer marks first, because the mark of UTF-32 begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Python's `surrogateescape` keeps a byte that it cannot decode as one of these.
FIRST_ESCAPE, LAST_ESCAPE = 0xDC80, 0xDCFF


def decode(data: bytes, source: str, encoding: str = "utf-8") -> str:
    """Decode `data`, with line ends as newlines. A byte order mark overrides `encoding` and is removed.

    Raises: ConfigError naming the byte and its offset when the data is not in that encoding.
    """
    for mark, marked in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], marked
            break
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper()
        raise ConfigError(
            f"{source} is not {name}: byte 0x{data[error.start]:02x} at offset {error.start:,} ({error.reason}). "
            "Convert it first: iconv -f ISO-8859-1 -t UTF-8, with the encoding that it is in."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or the encoding of its byte order mark.

    Raises: ConfigError when it cannot be read or decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    return decode(data, str(path))


def check_text(text: object, what: str) -> None:
    """Refuse text that cannot be encoded as UTF-8 and therefore has no tokens.

    Raises: ConfigError naming the character and its offset.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{what} is {type(text).__name__}, not text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if FIRST_ESCAPE <= code <= LAST_ESCAPE:
            found = f"byte 0x{code - 0xDC00:02x}, which is not UTF-8,"
        else:
            found = f"the lone surrogate U+{code:04X}, half of a character,"
        raise ConfigError(
            f"{what} has {found} at offset {error.start:,}. Convert it to UTF-8 first (iconv -f ISO-8859-1 -t UTF-8, "
            "with the encoding that it is in), or leave the character out."
        ) from None


def unescape(text: str, what: str, encoding: str) -> str:
    """Decode text again that `surrogateescape` decoded with a wrong `encoding`.

    Raises: ConfigError when it is not UTF-8 either.
    """
    if not any(FIRST_ESCAPE <= ord(character) <= LAST_ESCAPE for character in text):
        return text
    try:
        data = text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        check_text(text, what)
        raise
    return decode(data, what)
