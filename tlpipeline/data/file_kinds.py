"""What a file is that no decoder reads, by its first bytes, and what to do with it."""

import re
import struct

_CONVERT = "convert it to JPEG or PNG"
_EXPORT = "export the picture as PNG or TIFF"
# Brands of the container that HEIC, AVIF and MP4 share, after `ftyp`.
_BRANDS = {
    b"heic": ("a HEIC photo", f"{_CONVERT}; phones can be set to take JPEG"),
    b"heix": ("a HEIC photo", f"{_CONVERT}; phones can be set to take JPEG"),
    b"hevc": ("a HEIC photo", f"{_CONVERT}; phones can be set to take JPEG"),
    b"mif1": ("a HEIF photo", _CONVERT),
    b"msf1": ("a HEIF photo", _CONVERT),
    b"avif": ("an AVIF image", f"install a Pillow with AVIF (`pip install --upgrade pillow`), or {_CONVERT}"),
    b"avis": ("an AVIF image", f"install a Pillow with AVIF (`pip install --upgrade pillow`), or {_CONVERT}"),
    b"crx ": ("a raw photo", "export it as JPEG or TIFF"),
}
_FRAMES = "save its frames as images, and name their group by data.group"
_VIDEO = ("a video", _FRAMES)
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/", "a pointer of Git LFS, not the file itself", "fetch the files (`git lfs pull`)"),
    (b"\xff\x0a", "a JPEG XL image", _CONVERT),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", _CONVERT),
    (b"%PDF", "a PDF document", "save its pages as images"),
    (b"%!PS", "a PostScript drawing", _EXPORT),
    (b"\xc5\xd0\xd3\xc6", "a PostScript drawing", _EXPORT),
    (b"8BPS", "a Photoshop document", _EXPORT),
    (b"gimp xcf", "a GIMP document", _EXPORT),
    (b"v/1\x01", "an OpenEXR image", _EXPORT),
    (b"#?RADIANCE", "a Radiance image", _EXPORT),
    (b"FUJIFILMCCD-RAW", "a raw photo", "export it as JPEG or TIFF"),
    (b"\x1aE\xdf\xa3", *_VIDEO),
    (b"\0\0\x01\xba", *_VIDEO),
    (b"\0\0\x01\xb3", *_VIDEO),
    (b"FLV\x01", *_VIDEO),
    (b"OggS", "a sound or video", _FRAMES),
    (b"ID3", "a sound", "remove it"),
    (b"\0\0\x01\0", "an icon", _EXPORT),
    (b"\x93NUMPY", "a NumPy array", "save each image as PNG or TIFF"),
    (b"\x89HDF\r\n", "an HDF5 file", "save each image as PNG or TIFF"),
    (b"SIMPLE  =", "a FITS image", "save it as TIFF"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"\x7fELF", "a program", "remove it"),
    (b"\0\x05\x16\x07", "what macOS keeps beside a file", "remove it"),
)  # fmt: skip
_DVC = re.compile(rb"\A\s*outs:\s*\n-\s+(?:md5|hash|size|path|etag)", re.MULTILINE)
_SAMPLES, _BITS, _DNG = 277, 258, 50706


def kind_of(content: bytes) -> str:
    """Return what a file is and what to do, "" if its first bytes do not tell."""
    head = content[:1024]
    for beginning, what, way_out in _BEGINNINGS:
        if head.startswith(beginning):
            return f"{what}: {way_out}"
    if head[4:8] == b"ftyp":
        brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(int.from_bytes(head[:4], "big"), 64), 4))]
        what, way_out = next((_BRANDS[brand] for brand in brands if brand in _BRANDS), _VIDEO)
        return f"{what}: {way_out}"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return ": ".join(_VIDEO)
    if head[128:132] == b"DICM":
        return "a DICOM image: save its pixels as PNG or TIFF, with the window that shows what matters"
    if head[344:348] in (b"n+1\0", b"ni1\0"):
        return "a NIfTI volume: save its slices as PNG or TIFF, and name their group by data.group"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(content)
    return _text(head)


def _text(head: bytes) -> str:
    """Return what a text is, "" if it is none that is often taken for an image."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = text[:512].lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page, perhaps an error of the server that it was fetched from: fetch it again"
    if lower.startswith(b"<svg") or (lower.startswith(b"<?xml") and b"<svg" in head.lower()):
        return f"an SVG drawing: {_EXPORT}"
    if _DVC.match(head):
        return "a pointer of DVC, not the file itself: fetch the files (`dvc pull`)"
    return ""


def _tiff(content: bytes) -> str:
    """Return what a TIFF holds that cannot be read."""
    tags = _tiff_tags(content)
    if _DNG in tags:
        return "a raw photo (DNG): export it as JPEG or TIFF"
    if content[8:10] == b"CR":
        return "a raw photo (CR2): export it as JPEG or TIFF"
    samples, bits = tags.get(_SAMPLES, (1,))[0], tags.get(_BITS, (1,))[0]
    if samples > 4:
        return f"a TIFF with {samples} bands, of which 1, 3 or 4 can be read: save three of them"
    return f"a TIFF with {samples} bands of {bits} bits, which Pillow cannot read: save it with 8 bits, or as PNG"


def _tiff_tags(content: bytes) -> dict[int, tuple[int, ...]]:
    """Return the whole-number tags of the first page of a TIFF, as far as they can be read."""
    order = "<" if content[:2] == b"II" else ">"
    large = content[2:4] in (b"+\0", b"\0+")
    sizes = {1: "B", 3: "H", 4: "I", 16: "Q"}
    tags: dict[int, tuple[int, ...]] = {}
    try:
        (at,) = struct.unpack_from(order + ("Q" if large else "I"), content, 8 if large else 4)
        (count,) = struct.unpack_from(order + ("Q" if large else "H"), content, at)
        at += 8 if large else 2
        for entry in range(min(count, 1000)):
            place = at + entry * (20 if large else 12)
            tag, kind = struct.unpack_from(order + "HH", content, place)
            (number,) = struct.unpack_from(order + ("Q" if large else "I"), content, place + 4)
            if kind not in sizes or not 0 < number <= 1000:
                continue
            value, room = place + (12 if large else 8), 8 if large else 4
            if number * struct.calcsize(sizes[kind]) > room:
                (value,) = struct.unpack_from(order + ("Q" if large else "I"), content, value)
            tags[tag] = struct.unpack_from(f"{order}{number}{sizes[kind]}", content, value)
    except struct.error:  # cut off
        pass
    return tags
