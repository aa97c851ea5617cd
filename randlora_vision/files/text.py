"""Reading text files that people wrote: UTF-8 with or without a byte order mark; other encodings are an error."""

from __future__ import annotations

import codecs
from pathlib import Path

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def require_regular(path: Path) -> None:
    """Raise OSError unless `path` is an existing regular file: reading a pipe or a device may never end."""
    if not path.is_file() and path.stat().st_mode:  # stat raises for a missing file
        raise OSError(f"{path} is not a regular file")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without its byte order mark and with its line endings as they are.

    Raises OSError for anything but a regular file, and ValueError, with the remedy, for another encoding.
    """
    require_regular(path)
    return decode_text(path.read_bytes(), str(path))


def decode_text(content: bytes, name: str) -> str:
    """Return UTF-8 text without its byte order mark; `name` identifies it in the error."""
    encoding = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), None)
    where = ""
    if encoding is None:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            encoding = "WINDOWS-1252"
            line = content.count(b"\n", 0, error.start) + 1
            where = f" (line {line}, byte 0x{content[error.start]:02x})"
        else:
            if "\0" not in text:
                return text
            encoding, where = "UTF-16", " (it contains NUL characters)"
    perhaps = "it seems to be" if encoding.startswith("UTF") else "it may be"
    raise ValueError(
        f"{name} is not UTF-8 text{where}; {perhaps} {encoding}: save it as UTF-8, for example with "
        f"iconv -f {encoding} -t UTF-8"
    )


def as_utf8(text: object) -> str:
    r"""Return a name or text as it can be written to a UTF-8 file.

    Bytes of a file name that are not UTF-8 become ``\xff``, and other surrogates, as JSON may have them, ``\ud800``.
    """
    name = str(text)
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode("utf-8")
