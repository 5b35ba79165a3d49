"""Image files of every mode become the pixels that they show."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from tests.helpers.images import encoded, paint
from tests.helpers.mutations import damaged
from tests.helpers.processes import run_python
from tlpipeline.data import decoding, facts
from tlpipeline.data.decoding import decode
from tlpipeline.data.loader import resize_and_crop
from tlpipeline.data.transforms import Transforms

WHITE, RED, BLACK = [255, 255, 255], [255, 0, 0], [0, 0, 0]


def pixels(content: bytes) -> list[Any]:
    """Decode, check that it is 8-bit RGB, and return the rows of pixels."""
    image = decode(content)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()  # type: ignore[no-any-return]


def test_gray_becomes_rgb() -> None:
    assert pixels(encoded(Image.fromarray(np.array([[0, 7, 255]], np.uint8)))) == [[BLACK, [7, 7, 7], WHITE]]


def test_black_and_white_becomes_rgb() -> None:
    assert pixels(encoded(Image.new("1", (1, 2), 1))) == [[WHITE], [WHITE]]


def test_rgb_stays_as_it_is() -> None:
    image = paint(1, 1)
    assert pixels(encoded(image)) == np.asarray(image).tolist()


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def test_a_palette_becomes_its_colors() -> None:
    assert pixels(encoded(palette())) == [[RED, [0, 255, 0], [0, 0, 255]]]


def test_a_transparent_palette_entry_becomes_white() -> None:
    assert pixels(encoded(palette(), transparency=1)) == [[RED, WHITE, [0, 0, 255]]]


def test_half_transparent_palette_entries_are_laid_over_white() -> None:
    assert pixels(encoded(palette(), transparency=bytes([255, 0, 51]))) == [[RED, WHITE, [204, 204, 255]]]


def test_transparency_is_laid_over_white() -> None:
    image = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8), "RGBA")
    assert pixels(encoded(image)) == [[RED, WHITE, [204, 204, 204]]]


def test_gray_transparency_is_laid_over_white() -> None:
    image = Image.fromarray(np.array([[[9, 255], [9, 0], [0, 51]]], np.uint8), "LA")
    assert pixels(encoded(image)) == [[[9, 9, 9], WHITE, [204, 204, 204]]]


@pytest.mark.parametrize(("mode", "color"), [("L", 7), ("RGB", (7, 8, 9))])
def test_a_color_that_is_declared_transparent_becomes_white(mode: str, color: Any) -> None:
    image = Image.new(mode, (2, 1), color)
    image.putpixel((1, 0), 3 if mode == "L" else (3, 3, 3))
    assert pixels(encoded(image, transparency=color)) == [[WHITE, [3, 3, 3]]]


def test_cmyk_becomes_rgb() -> None:
    assert pixels(encoded(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF")) == [[[0, 255, 255]]]
    ((found,),) = pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.array(found) - RED).max() <= 4


def test_16_bit_grays_are_scaled_by_their_full_range() -> None:
    image = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        assert pixels(encoded(image, kind)) == [[BLACK, [1, 1, 1], [128, 128, 128], WHITE]]


def test_a_transparent_16_bit_gray_becomes_white_and_the_others_keep_their_scale() -> None:
    image = Image.fromarray(np.array([[0, 257, 32768]], np.uint16))
    assert pixels(encoded(image, transparency=0)) == [[WHITE, [1, 1, 1], [128, 128, 128]]]


def test_16_bit_colors_become_8_bit() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    line = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 257 * 7, 0)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")
    assert pixels(png) == [[RED, [0, 7, 0]]]


def test_floating_point_pixels_are_scaled_by_their_own_range() -> None:
    assert pixels(encoded(Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32)), "TIFF")) == [[BLACK, [128, 128, 128], WHITE]]


def test_floating_point_pixels_that_are_no_numbers_do_not_spoil_the_others() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 0.0, 2.0, 1.0]], np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF")) == [[BLACK, WHITE, BLACK, BLACK, WHITE, [128, 128, 128]]]


def test_floating_point_pixels_of_one_value_are_black() -> None:
    assert pixels(encoded(Image.new("F", (1, 1), 5.0), "TIFF")) == [[BLACK]]


def test_an_image_without_a_single_number_is_refused() -> None:
    with pytest.raises(ValueError, match="no finite pixel"):
        decode(encoded(Image.new("F", (1, 1), float("nan")), "TIFF"))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    first, second = Image.new("RGB", (2, 2), (255, 0, 0)), Image.new("RGB", (2, 2), (0, 0, 255))
    content = encoded(first, "GIF", save_all=True, append_images=[second], duration=10)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 2
    assert pixels(content) == [[RED, RED], [RED, RED]]


@pytest.mark.parametrize(
    ("orientation", "turned"), [(1, [[1, 2, 3]]), (2, [[3, 2, 1]]), (3, [[3, 2, 1]]), (6, [[1], [2], [3]]), (8, [[3], [2], [1]])]
)
def test_the_orientation_that_the_camera_noted_is_applied(orientation: int, turned: list[list[int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.array([[1, 2, 3]], np.uint8)), exif=exif)
    assert [[red for red, _, _ in line] for line in pixels(content)] == turned


def test_a_damaged_exif_block_does_not_cost_the_image() -> None:
    image = paint(0, 0)
    content = encoded(image, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pytest puts filters of its own before the library's
        assert pixels(content) == np.asarray(image).tolist()


def test_a_damaged_exif_block_says_nothing_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(encoded(paint(0, 0), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff broken"))
    code = "from pathlib import Path\nfrom tlpipeline.data.decoding import decode\nprint(decode(Path('image.png').read_bytes()).size)"
    done = run_python(tmp_path, "-c", code)
    assert (done.stdout, done.stderr) == ("(32, 32)\n", "")


def test_decoding_leaves_the_filters_for_warnings_as_other_threads_see_them(monkeypatch: Any) -> None:
    before, seen = list(warnings.filters), []

    def look(image: Image.Image) -> Image.Image:
        seen.append(list(warnings.filters))
        return image

    monkeypatch.setattr(ImageOps, "exif_transpose", look)
    decode(encoded(paint(0, 0)))
    assert seen == [before]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("side", "share"), [(48, 1 / 64), (100, 1 / 16), (200, 1 / 4), (400, 1)])
def test_a_jpeg_is_decoded_no_larger_than_it_is_needed_and_to_the_same_picture(side: int, share: float, orientation: int) -> None:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(coarse.resize((1200, 800), Image.Resampling.BICUBIC), "JPEG", quality=95, exif=exif)
    full, scaled = decode(content), decode(content, 2 * side)
    assert min(scaled.size) >= 2 * side
    assert scaled.width * scaled.height == pytest.approx(full.width * full.height * share, rel=0.02)
    transforms = Transforms(side, side, (0.5,) * 3, (0.5,) * 3, "bilinear")
    one, other = (resize_and_crop(image, transforms).astype(int) for image in (full, scaled))
    assert np.abs(one - other).mean() < 1.5
    assert np.abs(one - other).max() < 24


@pytest.mark.parametrize("short", [792, 796, 799, 800, 801, 808])
def test_a_jpeg_is_never_decoded_smaller_than_it_is_needed(short: int) -> None:
    """An eighth of 792 is one pixel too few."""
    for size in ((1200, short), (short, 1200)):
        assert min(decode(encoded(Image.new("RGB", size), "JPEG"), 100).size) >= 100


def test_an_error_without_a_text_is_told_by_its_kind() -> None:
    assert decoding.describe_error(EOFError()) == "broken: EOFError"
    assert decoding.describe_error(OSError("cut off")) == "broken: cut off"


# --- pixels that do not show what is in the file ---------------------------------------------------------------------------------------


def noted(content: bytes) -> str:
    """Return what is said of an image."""
    inspected = decoding.inspect(content)
    assert not isinstance(inspected, str), inspected
    return ", ".join(inspected.notes)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[-1000, -650, -300]], np.int32), "TIFF"),  # Hounsfield units
        (np.array([[100_000, 100_350, 100_700]], np.int32), "TIFF"),  # sums
        (np.array([[0, 60, 120]], np.uint16), "PNG"),
        (np.array([[5, 2050, 4095]], np.uint16), "TIFF"),  # 12 bits
    ],
)
def test_whole_numbers_that_do_not_use_16_bits_are_scaled_by_their_own_range(values: Any, kind: str) -> None:
    content = encoded(Image.fromarray(values), kind)
    assert pixels(content) == [[BLACK, [128, 128, 128], WHITE]]
    assert noted(content) == decoding.DEEP


def test_a_value_that_stands_for_no_data_does_not_spoil_the_others() -> None:
    for values in (np.array([[-9999, 100, 200, 300]], np.int32), np.array([[-9999, 1, 2, 3]], np.float32)):
        content = encoded(Image.fromarray(values), "TIFF", tiffinfo={42113: "-9999"})
        assert pixels(content) == [[BLACK, BLACK, [128, 128, 128], WHITE]]


def four_bands(pixels: Any, extra: int | None) -> bytes:
    """Return (height, width, 4) uint8 as an RGB TIFF whose tag says what the fourth sample is, or that has no tag."""
    height, width, _ = pixels.shape
    bits, body = struct.pack("<4H", 8, 8, 8, 8), pixels.tobytes()
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 4, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 16), (277, 3, 1, 4)]
    tags += [(278, 4, 1, height), (279, 4, 1, len(body))] + ([] if extra is None else [(338, 3, 1, extra)])
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 16 + len(body)) + bits + body + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("extra", [None, 0, 2])
def test_a_fourth_channel_is_transparency_only_if_the_file_says_so(extra: int | None) -> None:
    content = four_bands(np.array([[[255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), extra)
    assert pixels(content) == ([[WHITE, BLACK]] if extra == 2 else [[RED, BLACK]])
    assert noted(content) == ("" if extra == 2 else decoding.CHANNEL)


def test_an_image_that_is_transparent_everywhere_shows_its_colors() -> None:
    content = encoded(Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 0]]], np.uint8), "RGBA"))
    assert pixels(content) == [[RED, BLACK]]
    assert noted(content) == decoding.CONCEALED


def test_white_strokes_on_nothing_are_laid_over_black() -> None:
    content = encoded(Image.fromarray(np.array([[[255, 255, 255, 255], [255, 255, 255, 0]]], np.uint8), "RGBA"))
    assert pixels(content) == [[WHITE, BLACK]]
    assert noted(content) == decoding.ON_BLACK


def test_the_largest_page_that_is_not_blank_is_read() -> None:
    picture, blank, preview = paint(0, 0), Image.new("RGB", (32, 32), (250, 250, 250)), paint(0, 0, 8)
    for others in ([preview, picture], [blank, picture], [preview, blank, picture, paint(1, 1)], [picture, blank]):
        content = encoded(others[0], "TIFF", save_all=True, append_images=others[1:])
        assert np.array_equal(np.asarray(decode(content)), np.asarray(picture))
        assert noted(content) == decoding.PAGES
    damage = encoded(picture, "TIFF", save_all=True, append_images=[preview])
    assert decode(damage[: len(damage) - 40]).size == (32, 32)


def test_colors_of_16_bits_are_told() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + bytes(6))) + chunk(b"IEND", b"")
    assert noted(png) == decoding.DEEP_COLORS
    assert noted(encoded(paint(0, 0))) == noted(encoded(paint(0, 0), "TIFF")) == noted(encoded(paint(0, 0).convert("L"))) == ""


# --- files that are no images of a known format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "a HEIC photo: convert it to JPEG or PNG"),
        (b"\0\0\0\x20ftypmif1\0\0\0\0mif1heicmiaf" + bytes(50), "a HEIF photo: convert"),
        (b"\xff\x0a" + bytes(50), "a JPEG XL image: convert"),
        (bytes(128) + b"DICM" + bytes(50), "a DICOM image: save its pixels"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a pointer of Git LFS, not the file itself: fetch the files (`git lfs",
        ),
        (
            b"outs:\n- md5: d41d8cd98f00b204e9800998ecf8427e\n  size: 3\n",
            "a pointer of DVC, not the file itself: fetch the files (`dvc pull`",
        ),
        (b"<!DOCTYPE html><html><body>403</body>", "a web page, perhaps an error of the server"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(50), "a video: save its frames as images, and name their group by data.group"),
        (b"RIFF\0\0\0\0AVI LIST", "a video: "),
        (b"%PDF-1.7\n", "a PDF document: save its pages as images"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing: export"),
        (b"PK\x03\x04" + bytes(50), "a zip archive: unpack it"),
        (b"path,label\na.jpg,cat\n", "not an image: the formats are JPEG, PNG, "),
        (bytes(range(256)), "not an image: the formats are JPEG, PNG, "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_image_is_called_by_its_kind(content: bytes, words: str) -> None:
    assert str(decoding.inspect(content)).startswith(words)


def test_a_tiff_of_many_bands_is_told_with_their_number() -> None:
    content = four_bands(np.zeros((2, 2, 4), np.uint8), None)
    at = content.index(struct.pack("<HHII", 277, 3, 1, 4))
    many = content[:at] + struct.pack("<HHII", 277, 3, 1, 13) + content[at + 12 :]
    assert decoding.inspect(many) == "a TIFF with 13 bands, of which 1, 3 or 4 can be read: save three of them"


# --- files that would do harm ---------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n%%EOF\n"


def test_a_file_in_another_format_is_refused_whatever_its_name_and_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow gives EPS to Ghostscript."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert decoding.inspect(EPS) == "a PostScript drawing: export the picture as PNG or TIFF"
    with pytest.raises(UnidentifiedImageError):
        decode(EPS)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", [*decoding.FORMATS])
def test_each_format_that_is_promised_is_read(kind: str) -> None:
    image = paint(1, 1)
    assert decode(encoded(image, kind)).size == image.size


def png_header(width: int, height: int, depth: int, color: int) -> bytes:
    """The beginning of a PNG of any size: what is read before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def large_tiff() -> bytes:
    """A TIFF that says that it holds 10,000 x 10,000 floats."""
    content = encoded(Image.new("F", (100, 100)), "TIFF")
    for tag in (256, 257):  # width, height
        at = (
            content.index(struct.pack("<HHI", tag, 4, 1))
            if struct.pack("<HHI", tag, 4, 1) in content
            else content.index(struct.pack("<HHI", tag, 3, 1))
        )
        content = content[:at] + struct.pack("<HHII", tag, 4, 1, 10_000) + content[at + 12 :]
    return content


def large_webp() -> bytes:
    """A lossless WebP with transparency that says that it has 10,000 x 10,000 pixels."""
    content = encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", lossless=True)
    at = content.index(b"VP8L") + 9
    return content[:at] + struct.pack("<I", 9_999 | 9_999 << 14 | 1 << 28) + content[at + 4 :]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (png_header(13_000, 13_000, 16, 0), "13000 x 13000 pixels of mode I;16 take 2.7 GB"),
        (large_tiff(), "10000 x 10000 pixels of mode F take 3.2 GB"),
        (large_webp(), "10000 x 10000 pixels of mode RGBA take 3.2 GB"),
    ],
    ids=["png", "tiff", "webp"],
)
def test_an_image_that_takes_gigabytes_is_refused_before_it_is_decoded(content: bytes, what: str) -> None:
    assert str(decoding.inspect(content)).startswith(f"too large: {what} to decode, and the limit is 2.1 GB. Make it smaller")


def test_an_image_with_more_pixels_than_pillow_opens_is_called_too_large() -> None:
    text = str(decoding.inspect(png_header(20_000, 20_000, 8, 0)))
    assert text.startswith("too large: 400 megapixels, and the limit is 134. Make it smaller")


def test_a_side_is_bounded_before_anything_is_decoded() -> None:
    text = str(decoding.inspect(png_header(1, 1_048_576, 8, 0)))
    assert text.startswith("too large: 1 x 1048576 pixels, and a side may have 131,072. Make it smaller")


def test_the_limit_is_a_setting_and_no_more_is_told_of_an_image_above_it() -> None:
    content = encoded(Image.new("RGB", (1_100, 1_000)))
    reason = facts.measure(content, decoding.bytes_of(1)).reason
    assert reason.startswith("too large: 1100 x 1000 pixels of mode RGB take 0.0 GB to decode")
    assert "raise data.megapixels" in reason
    assert facts.measure(content, decoding.bytes_of(2)).reason == ""


def test_a_limit_above_pillow_s_own_lets_such_images_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    content = encoded(Image.new("L", (100, 100)))
    assert str(decoding.inspect(content)).startswith("too large")
    assert decoding.inspect(content, decoding.bytes_of(135)) == decoding.Inspected(100, 100, "L")


def test_facts_of_an_image_that_is_much_longer_than_wide_are_of_its_middle() -> None:
    pixels = np.zeros((8, 4_000, 3), np.uint8)
    pixels[:, 2_000 - 512 : 2_000 + 512] = 200
    measured = facts.measure(encoded(Image.fromarray(pixels)))
    assert (measured.width, measured.height, measured.brightness, measured.flat) == (4_000, 8, 200.0, True)


@pytest.mark.slow
def test_threads_that_decode_large_images_wait_for_each_other(tmp_path: Path) -> None:
    """Four images of 64 million pixels each, in four threads: beside each other they would take twice the limit."""
    Image.new("RGB", (8_000, 8_000)).save(tmp_path / "image.png")
    code = """
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tlpipeline.data import decoding, facts
content = Path("image.png").read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(4) as pool:
    assert len(list(pool.map(decoding.inspect, [content] * 4))) == 4
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < decoding.MAX_BYTES)
"""
    assert run_python(tmp_path, "-c", code).stdout == "True\n"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_mutant_of_an_image_is_read_or_said_in_words_to_be_unreadable(form: str) -> None:
    file = io.BytesIO()
    paint(1, 0, 24).save(file, form)
    read = [decoding.inspect(damaged(file.getvalue(), seed)) for seed in range(50)]
    assert all(what if isinstance(what, str) else what[:2] > (0, 0) for what in read)
    assert any(isinstance(what, str) for what in read)
