"""Hostile and odd files, made from small good ones: the same ones for the same seed, with NumPy and,
where a format is not written here by hand, with Pillow and SimpleITK.

Each maker returns the content of one file. `MAKERS` maps the name of a kind to ending and maker.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from lightm.images import itk

Rng = np.random.Generator
Maker = Callable[[Rng], bytes]

_FLOATS = (0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38, -3.4e38, 1e10, 352.0, 0.5)
_INTS = (0, 1, -1, 2, 3, 4, 7, 8, 127, 128, 255, 256, 32767, -32768, 348, 540, 1536, 1792, 2048, 2304)
_BIG = (0, 1, -1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), 540, 544)

# NIfTI-1: name of the field -> (first byte, format of the numbers), as nifti1.h has them.
NIFTI1 = {
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "intent": (56, "3f"), "datatype": (70, "h"), "bitpix": (72, "h"),
    "pixdim": (76, "8f"), "vox_offset": (108, "f"), "slope": (112, "2f"), "units": (123, "b"), "qform_code": (252, "h"),
    "sform_code": (254, "h"), "qform": (256, "6f"), "sform": (280, "12f"), "magic": (344, "4b"),
    "extension": (348, "i"),
}  # fmt: skip
NIFTI2 = {
    "sizeof_hdr": (0, "i"), "magic": (4, "8b"), "datatype": (12, "h"), "bitpix": (14, "h"), "dim": (16, "8q"),
    "pixdim": (104, "8d"), "vox_offset": (168, "q"), "slope": (176, "2d"), "qform_code": (344, "i"),
    "sform_code": (348, "i"), "qform": (352, "6d"), "sform": (400, "12d"), "units": (500, "i"), "extension": (540, "i"),
}  # fmt: skip


def good_nifti(rng: Rng, *, version: int = 1, order: str = "<", shape: tuple[int, int, int] = (5, 4, 3)) -> bytes:
    """A sound single file of int16 or float32 voxels; shape as (x, y, z)."""
    kind, code = [("i2", 4), ("f4", 16), ("u1", 2)][rng.integers(3)]
    voxels = rng.integers(0, 100, shape).astype(order + kind)
    size, fields = (348, NIFTI1) if version == 1 else (540, NIFTI2)
    head = bytearray(size + 4)

    def put(name: str, *values: float) -> None:
        at, form = fields[name]
        struct.pack_into(order + form, head, at, *values)

    put("sizeof_hdr", size)
    put("dim", 3, *shape, 1, 1, 1, 1)
    put("datatype", code)
    put("bitpix", voxels.itemsize * 8)
    put("pixdim", 1, 0.7, 0.8, 2.5, 1, 1, 1, 1)
    put("vox_offset", size + 4)
    put("slope", 1, 0)
    put("units", 2)
    put("sform_code", 1)
    put("sform", 0.7, 0, 0, -9, 0, 0.8, 0, 5, 0, 0, 2.5, 30)
    put("magic", *(b"n+1\0" if version == 1 else b"n+2\0\r\n\x1a\n"))
    return bytes(head) + voxels.tobytes(order="F")


def _number(rng: Rng, kind: str) -> float | int:
    if kind in "fd":
        return float(_FLOATS[rng.integers(len(_FLOATS))])
    choices = [v for v in (*_INTS, *_BIG) if -(1 << (8 * struct.calcsize("<" + kind) - 1)) <= v]
    value = int(choices[rng.integers(len(choices))])
    top = (1 << (8 * struct.calcsize("<" + kind) - 1)) - 1
    return min(value, top)


def nifti(rng: Rng) -> bytes:
    """A NIfTI file with one to three fields at extreme values, or with bytes changed, added or cut off."""
    version, order = int(rng.integers(1, 3)), "<>"[rng.integers(2)]
    content = bytearray(good_nifti(rng, version=version, order=order))
    fields = NIFTI1 if version == 1 else NIFTI2
    for _ in range(rng.integers(1, 4)):
        at, form = fields[list(fields)[rng.integers(len(fields))]]
        kind = form[-1]
        width = struct.calcsize("<" + kind)
        place = at + width * int(rng.integers(int(form[:-1] or 1)))
        struct.pack_into(order + kind, content, place, _number(rng, kind))
    return _damaged(rng, bytes(content)) if rng.random() < 0.3 else bytes(content)


def zipped_nifti(rng: Rng) -> bytes:
    """The same, compressed: whole, in several members, torn, with waste behind it, or as a bomb."""
    plain = nifti(rng)
    way = rng.integers(6)
    if way == 0:
        cut = int(rng.integers(len(plain)))
        return gzip.compress(plain[:cut], 1) + gzip.compress(plain[cut:], 1)
    if way == 1:
        return _damaged(rng, gzip.compress(plain, 1))
    if way == 2:
        return gzip.compress(plain, 1) + rng.bytes(int(rng.integers(1, 40)))
    if way == 3:
        return gzip_bomb(plain, 1 << int(rng.integers(16, 25)))
    return gzip.compress(plain, 1)


def gzip_bomb(start: bytes, zeros: int) -> bytes:
    """A gzip file of `start` and that many zeros behind it, a thousandth of their number in length."""
    out, packer = io.BytesIO(), zlib.compressobj(9, zlib.DEFLATED, 31)
    out.write(packer.compress(start))
    block = bytes(1 << 20)
    for _ in range(zeros >> 20):
        out.write(packer.compress(block))
    out.write(packer.compress(block[: zeros % (1 << 20)]))
    out.write(packer.flush())
    return out.getvalue()


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    """One chunk of a PNG file."""
    check = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_of(
    width: int, height: int, depth: int, colour: int, rows: bytes, *, interlace: int = 0, more: bytes = b""
) -> bytes:
    """A PNG file of raw scanlines; `more`: chunks before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + pixels + chunk(b"IEND", b"")


def png(rng: Rng) -> bytes:
    """A PNG of any depth and colour type: sound, with false sizes, odd chunks, or damaged."""
    colour = int(rng.choice([0, 2, 3, 4, 6]))
    depth = int(rng.choice([1, 2, 4, 8, 16]))
    width, height = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    length = (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8
    rows = b"".join(b"\0" + rng.bytes(length) for _ in range(height))
    more = chunk(b"PLTE", rng.bytes(3 * int(rng.integers(1, 5)))) if colour == 3 and rng.random() < 0.8 else b""
    extras = [
        b"",
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22))),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 22))),
        chunk(b"tEXt", b"k\0" + b"x" * 5000),
        chunk(b"acTL", struct.pack(">II", int(rng.integers(0, 2**31)), 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)),
        chunk(b"tRNS", rng.bytes(int(rng.integers(0, 8)))),
        chunk(b"gAMA", b""),
        struct.pack(">I", int(rng.integers(2**31))) + b"oDDa" + b"short",
    ]
    more += extras[rng.integers(len(extras))] if rng.random() < 0.6 else b""
    if rng.random() < 0.3:
        width, height = (int(v) for v in rng.choice([0, 1, 8000, 60000, 2**31 - 1, 2**32 - 1], 2))
    content = png_of(width, height, depth, colour, rows, interlace=int(rng.integers(3)), more=more)
    return _damaged(rng, content) if rng.random() < 0.4 else content


def dicom(rng: Rng) -> bytes:
    """A CT slice with attributes dropped, changed, doubled or given odd bytes, or with bytes changed or cut off."""
    import pydicom
    from pydicom.dataset import Dataset

    from .dicom_made import CT, ORIENTATION, ORIGIN, SERIES, base

    data = base(CT, "CT", SERIES, f"{SERIES}.1", rng.integers(0, 4096, (6, 7)).astype(np.uint16))
    data.ImagePositionPatient, data.ImageOrientationPatient = [float(v) for v in ORIGIN], ORIENTATION
    data.PixelSpacing, data.SliceThickness, data.RescaleSlope, data.RescaleIntercept = [0.8, 0.7], 2.5, 1, -1024
    odd: dict[str, list[object]] = {
        "Rows": [0, 1, 7, 65535], "Columns": [0, 1, 6, 65535], "BitsAllocated": [0, 1, 8, 16, 32, 64, 65535],
        "BitsStored": [0, 1, 8, 16, 33, 65535], "HighBit": [0, 40], "PixelRepresentation": [0, 1, 2, 9],
        "SamplesPerPixel": [0, 1, 3, 65535], "NumberOfFrames": [0, 1, 3, -1, 2**31 - 1],
        "PixelSpacing": [[0, 0], [-1, 1], [1e-30, 1], [1e30, 1], [1]], "ImagePositionPatient": [[0, 0], [1e30, 0, 0]],
        "ImageOrientationPatient": [[0] * 6, [1, 0, 0, 1, 0, 0], [1e9] * 6], "SliceThickness": [0, -3, 1e30],
        "RescaleSlope": [0, 1e300, -1], "RescaleIntercept": [1e300, -5], "PhotometricInterpretation": ["RGB", "", "X"],
        "PixelData": [b"", b"ab", bytes(10**5)], "SOPClassUID": ["", "1.2.3", "1.2.840.10008.5.1.4.1.1.2.1"],
        "SeriesInstanceUID": ["", "x" * 64], "Modality": ["", "MR"], "SeriesNumber": [0, -1],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom remarks on values that are wrong on purpose
        for _ in range(rng.integers(0, 4)):
            key = list(odd)[rng.integers(len(odd))]
            if rng.random() < 0.3 and key in data:
                delattr(data, key)
            else:
                setattr(data, key, odd[key][rng.integers(len(odd[key]))])
        if rng.random() < 0.1:
            for _ in range(int(rng.integers(1, 60))):
                outer = Dataset()
                outer.ReferencedImageSequence = [Dataset()]
                data.ReferencedSeriesSequence = [outer]
        syntaxes = ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5",
                    "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.4.50", "9.9"]  # fmt: skip
        out = io.BytesIO()
        if "PixelData" in data:
            data["PixelData"].VR = "OW"  # else it would have to follow from BitsAllocated
        pydicom.dcmwrite(out, data, enforce_file_format=True)
    content = bytearray(out.getvalue())
    if rng.random() < 0.3:  # another transfer syntax than the one it is written in
        at = content.index(b"1.2.840.10008.1.2.1")
        old = content[at : at + 20]
        new = syntaxes[rng.integers(len(syntaxes))].encode()[: len(old)]
        content[at : at + len(old)] = new.ljust(len(old), b"\0")
    if rng.random() < 0.3:  # another value representation
        at = int(rng.integers(140, len(content) - 140))
        content[at : at + 2] = [b"SQ", b"UN", b"OB", b"DS", b"US", b"XX"][rng.integers(6)]
    return _damaged(rng, bytes(content)) if rng.random() < 0.5 else bytes(content)


def bare_dicom(rng: Rng) -> bytes:
    """The same without preamble, and mostly without meta information."""
    content = dicom(rng)[132:]
    length = 12 + int.from_bytes(content[8:12], "little")
    return content if rng.random() < 0.2 else content[length:]


def zipped_dicom(rng: Rng) -> bytes:
    """A zip archive of some of the same, with hostile names, false sizes, bombs, odd methods, or bytes changed."""
    out, sound = io.BytesIO(), dicom(rng) if rng.random() < 0.5 else _sound_dicom(rng)
    names = ["a.dcm", "s/b", "../../x", "/etc/x", "C:\\x", "\u202e\n.dcm", "x" * 5000, ".hidden", "s/"]
    warnings.simplefilter("ignore")  # of names that are there twice
    method = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA][
        min(int(rng.integers(9)), 3)
    ]
    with zipfile.ZipFile(out, "w", method if rng.random() < 0.3 else zipfile.ZIP_DEFLATED) as archive:
        for _ in range(rng.integers(1, 3)):
            archive.writestr(names[rng.integers(len(names))] if rng.random() < 0.5 else f"s/{rng.integers(99)}", sound)
        if rng.random() < 0.1:
            archive.writestr("bomb.dcm", sound + bytes(1 << 24))
        if rng.random() < 0.1:
            archive.writestr("inner.zip", out.getvalue())
    content = bytearray(out.getvalue())
    table = content.rindex(b"PK\x01\x02")
    for at, width in (
        (8, 2),
        (10, 2),
        (16, 4),
        (20, 4),
        (24, 4),
        (28, 2),
        (42, 4),
    ):  # flags, method, checksum, sizes, place
        if rng.random() < 0.1:
            content[table + at : table + at + width] = rng.bytes(width)
    if rng.random() < 0.1:  # the length and place of the table of contents
        content[-10:-2] = rng.bytes(8)
    return _damaged(rng, bytes(content)) if rng.random() < 0.3 else bytes(content)


def _sound_dicom(rng: Rng) -> bytes:
    from .dicom_made import CT, ORIENTATION, ORIGIN, SERIES, base

    data = base(CT, "CT", SERIES, f"{SERIES}.1", rng.integers(0, 4096, (6, 7)).astype(np.uint16))
    data.ImagePositionPatient, data.ImageOrientationPatient = [float(v) for v in ORIGIN], ORIENTATION
    data.PixelSpacing, data.SliceThickness = [0.8, 0.7], 2.5
    out = io.BytesIO()
    data.save_as(out, enforce_file_format=True)
    return out.getvalue()


def description(rng: Rng) -> bytes:
    """A dataset.json (or split.json) with odd values, deep nesting, endless numbers or damage."""
    odd = [
        None,
        True,
        -1,
        0,
        1.5,
        2**80,
        float("nan"),
        1e308,
        "",
        "x" * 5000,
        [],
        {},
        [[]],
        {"a": {"b": []}},
        "\0",
        "../..",
    ]

    def pick() -> object:
        return odd[rng.integers(len(odd))]

    content: dict[str, object] = {
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1}, "numTraining": 3,
        "file_ending": ".nii.gz",
    }  # fmt: skip
    for _ in range(rng.integers(0, 3)):
        key = [*content, "training", "test", "modality"][rng.integers(len(content) + 3)]
        way = rng.integers(3)
        content[key] = pick() if way == 0 else {"0": pick(), "background": pick()} if way == 1 else [pick(), pick()]
    text = json.dumps(content)
    if rng.random() < 0.3:
        text = text.replace('"MRI"', ["[" * 200_000, "9" * 5000, '"\\ud800"', "{" * 300, "1e999"][rng.integers(5)])
    raw = text.encode("utf-8", "surrogatepass")
    return _damaged(rng, raw) if rng.random() < 0.4 else raw


def settings(rng: Rng) -> bytes:
    """A plan.yaml with aliases, merges, odd tags, deep nesting or damage."""
    levels = int(rng.integers(2, 40))
    bomb = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels))
    merges = "a0: &a0 {k: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, levels)
    )
    tags = ["!!int x", "!!float y", "!!timestamp z", "!!binary '*'", "!!bool maybe", "!!set {a, b}", "!!omap [a: 1]",
            "!!python/object/apply:os.system [x]", "2001-99-99", "9" * 5000, "1:99:" * 50 + "1", "_", "0x", ".inf",
            "&a [*a]"]  # fmt: skip
    values = [
        bomb,
        merges,
        "a: " + "[" * 5000,
        "{" * 3000,
        "? [a, b]\n: c\n",
        "\0",
        "- 1\n- 2\n",
        "",
        "---\na: 1\n---\nb: 2\n",
    ]
    plain = "schema_version: 1\ndataset: x\nspatial_dims: 3\nspacing_mm: [1, 1, 1]\n"
    tag = tags[rng.integers(len(tags))]
    content = values[rng.integers(len(values))] if rng.random() < 0.5 else plain + f"patch_size: {tag}\n"
    raw = content.encode()
    return _damaged(rng, raw) if rng.random() < 0.3 else raw


def _damaged(rng: Rng, content: bytes) -> bytes:
    changed = bytearray(content)
    way = rng.integers(4)
    if way == 0:
        return bytes(changed[: rng.integers(len(changed))]) if changed else b""
    if way == 1 and changed:
        at = int(rng.integers(len(changed)))
        return bytes(changed[:at]) + rng.bytes(int(rng.integers(1, 20))) + bytes(changed[at:])
    for _ in range(rng.integers(1, 9)):
        if changed:
            changed[rng.integers(len(changed))] = rng.integers(256)
    return bytes(changed)


def _itk(rng: Rng, ending: str, *, packed: bool = False) -> bytes:
    """A sound file of a format that SimpleITK writes; of a pair the header alone."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(rng.integers(0, 100, (3, 4, 5)).astype(np.int16))
    image.SetSpacing((0.7, 0.8, 2.5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"odd{ending}"
        with itk._itk(ending, "not written"):
            SimpleITK.WriteImage(image, str(path), packed)
        return path.read_bytes()


def _picture(rng: Rng, name: str) -> bytes:
    """A sound picture, grey or in colour; a TIFF of one or several pages."""
    from PIL import Image

    out, colour = io.BytesIO(), rng.random() < 0.5
    pages = [Image.fromarray(rng.integers(0, 255, (6, 5, 3) if colour else (6, 5)).astype(np.uint8)) for _ in range(3)]
    several = {"save_all": True, "append_images": pages[1:]} if name == "TIFF" and rng.random() < 0.5 else {}
    packing = {"compression": str(rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate"]))} if name == "TIFF" else {}
    pages[0].save(out, format=name, **several, **packing)
    return out.getvalue()


def _mutated(make: Callable[[Rng], bytes]) -> Maker:
    """The same with bytes or digits changed, put in, taken out, copied, or the rest cut off, mostly in the header."""

    def maker(rng: Rng) -> bytes:
        content = bytearray(make(rng))
        for _ in range(int(rng.choice([0, 1, 1, 2, 4, 8]))):
            head = min(len(content), 420)
            at, way = int(rng.integers(head if rng.random() < 0.8 else len(content))), rng.integers(6)
            if way == 0:
                content[at] = int(rng.integers(256))
            elif way == 1:
                del content[at : at + int(rng.integers(1, 20))]
            elif way == 2:
                content[at:at] = bytes(rng.choice(list(b"0123456789-. \n:eE"), int(rng.integers(1, 12))).tolist())
            elif way == 3:
                content[at : at + 4] = struct.pack("<i", int(_number(rng, "i")))
            elif way == 4:
                other = int(rng.integers(len(content)))
                content[other : other + 8] = content[at : at + 8]
            else:
                content = content[: at + 1]
            content = content or bytearray(b"x")
        return bytes(content)

    return maker


MAKERS: dict[str, tuple[str, Maker]] = {
    "NIfTI": (".nii", nifti),
    "NIfTI, gzip": (".nii.gz", zipped_nifti),
    "PNG": (".png", png),
    "JPEG": (".jpg", _mutated(partial(_picture, name="JPEG"))),
    "BMP": (".bmp", _mutated(partial(_picture, name="BMP"))),
    "TIFF": (".tif", _mutated(partial(_picture, name="TIFF"))),
    "NRRD": (".nrrd", _mutated(partial(_itk, ending=".nrrd"))),
    "NRRD, gzip": (".nrrd", _mutated(partial(_itk, ending=".nrrd", packed=True))),
    "MetaImage": (".mha", _mutated(partial(_itk, ending=".mha"))),
    "MetaImage, zlib": (".mha", _mutated(partial(_itk, ending=".mha", packed=True))),
    "MetaImage, pair": (".mhd", _mutated(partial(_itk, ending=".mhd"))),
    "VTK": (".vtk", _mutated(partial(_itk, ending=".vtk"))),
    "NIfTI, pair": (".hdr", _mutated(partial(_itk, ending=".hdr"))),
    "DICOM": (".dcm", dicom),
    "DICOM, bare": ("", bare_dicom),
    "DICOM, zip": (".zip", zipped_dicom),
    "dataset.json": (".json", description),
    "plan.yaml": (".yaml", settings),
}
