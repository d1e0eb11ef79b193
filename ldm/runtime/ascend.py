"""What differs between the generations of Ascend devices, and how CANN and MindSpore are asked about them.

The first Ascend 910 and the Atlas A2 and A3 series differ in ways that decide how a network must be run:

| | first 910 | A2, A3 |
| --- | --- | --- |
| a number above fp16's largest | becomes the largest | becomes infinity (INFNAN mode) |
| fp32 matrix products and convolutions | do not exist | exist |
| flash attention | does not exist | exists |

"Ascend910B" alone is a first 910; the A2 series is "Ascend910B1" to "Ascend910B4". MindSpore's own table of names
(`SetContextSocVersion` in its Ascend plugin) says the same.
"""

from __future__ import annotations

import ctypes

FIRST_910 = frozenset(("Ascend910", "Ascend910A", "Ascend910B", "Ascend910PremiumA", "Ascend910ProA", "Ascend910ProB"))


def device_name() -> str:
    """Return the device's name as CANN reports it, such as "Ascend910B3", or "" where CANN is not there.

    This is the function of CANN that `mindspore.hal.get_device_name` calls. In MindSpore's dry run that function
    returns the name of no device, while CANN's own still answers.
    """
    try:
        function = ctypes.CDLL("libascendcl.so").aclrtGetSocName
    except (OSError, AttributeError):
        return ""
    function.restype = ctypes.c_char_p
    return (function() or b"").decode("ascii", "replace")


def is_first_910(name: str) -> bool:
    """Whether a device is one of the first generation of Ascend 910."""
    return name in FIRST_910


def is_a2_or_later(name: str) -> bool:
    """Whether a device is of the Atlas A2 or A3 series ("Ascend910B1", "Ascend910_9391")."""
    return name.startswith("Ascend910") and name not in FIRST_910
