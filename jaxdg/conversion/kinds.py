"""What a file is, by its first bytes: what people give for a checkpoint that is none gets a line of
its own.
"""

from pathlib import Path

POINTER = (
    "is a pointer of git-lfs and not the file: fetch it (git lfs pull), or download it from the"
    " page of the file"
)
PAGE = (
    "is a page of text (HTML, XML or JSON) and not the file, as a download that failed leaves it;"
    " open the link in a browser and log in"
)
PAGES = (
    b"<!doctype",
    b"<html",
    b"<?xml",
    b"<head",
    b"{",
    b"not found",
    b"access denied",
    b"entry not found",
    b"invalid ",
)
STARTS = (
    (b"version https://git-lfs", POINTER),
    (
        b"GGUF",
        (
            "is a GGUF file of quantised weights, which are not read; take the .safetensors or .pth"
            " of the same model"
        ),
    ),
    (
        b"\x89HDF",
        "is an HDF5 file (Keras), which is not read; take the model's PyTorch or NumPy file",
    ),
    (b"ustar", "is a tar archive; unpack it and give the file inside"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it (gunzip) and give the file inside"),
    (b"\xfd7zXZ", "is compressed by xz; unpack it and give the file inside"),
    (b"(\xb5/\xfd", "is compressed by zstd; unpack it and give the file inside"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it and give the file inside"),
    (b"Rar!", "is a RAR archive; unpack it and give the file inside"),
)


def foreign(path: Path) -> str | None:
    """What a file is if it is surely no checkpoint that is read, and what to do about it; None if
    it may be one.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "cannot be read (it is empty, 0 bytes): cut short; download it again"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    # Text holds no zero byte, and the length that a safetensors file begins with has four.
    if b"\0" not in start[:64] and text.startswith(PAGES):
        return f"cannot be read: it {PAGE}"
    if start[257:262] == b"ustar":
        start = b"ustar"
    known = next((what for magic, what in STARTS if start.startswith(magic)), None)
    if known is None and path.suffix == ".onnx":
        known = (
            "is an ONNX file, a program with its weights, which is not read; take the .safetensors"
            " or .pth of the same model"
        )
    return f"cannot be read: it {known}" if known else None
