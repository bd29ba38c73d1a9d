"""GGUF files, byte by byte."""

import struct

FORMATS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, x):
    if kind == 8:
        return string(x)
    if kind == 9:
        inner, items = x
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack(FORMATS[kind], x)


def gguf(fields, version=3, tensors=0):
    """A file of {key: (value type, value)}; an array's value is (element type, elements)."""
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, len(fields))
    return head + b"".join(
        string(k) + struct.pack("<I", kind) + value(kind, x) for k, (kind, x) in fields.items()
    )
