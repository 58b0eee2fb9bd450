"""Metadata addresses, as they are written and as they may be disguised."""

from __future__ import annotations

METADATA = "169.254.169.254"

DISGUISES = [
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "0:0:0:0:0:ffff:a9fe:a9fe",
    "::169.254.169.254",
    "::ffff:0:169.254.169.254",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::169.254.169.254",
    "64:ff9b:1:a9fe:a9:fe00::",
    "64:ff9b:1:aba9:fe:a9fe::",
    "64:ff9b:1:abab:a9:fea9:fe00:0",
    "2002:a9fe:a9fe::1",
    "2001:db8::5efe:169.254.169.254",
    "2001:db8::200:5efe:169.254.169.254",
    "2001:0:a9fe:a9fe:8000:1:f5ff:fffe",
    "2001:0:a00:1:8000:1:5601:5601",
    "::ffff:100.100.100.200",
    "64:ff9b::168.63.129.16",
]

ODD_SPELLINGS = [
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.16689662",
    "0xA9.254.0251.254",
]
