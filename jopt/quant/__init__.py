"""Quantization: number formats, fake quantization, quantized leaves, policies, calibration."""

from ._calibrate import Row as Row
from ._calibrate import calibrate as calibrate
from ._fake import fake_quant as fake_quant
from ._fake import fake_quant_affine as fake_quant_affine
from ._formats import Format as Format
from ._formats import Grid as Grid
from ._formats import Int as Int
from ._leaves import FakeQuant as FakeQuant
from ._leaves import QArray as QArray
from ._leaves import Range as Range
from ._policy import Policy as Policy
from ._policy import Spec as Spec
from ._quantize import qat as qat
from ._quantize import quantize as quantize
from ._quantize import trainable as trainable

# Importing these registers what `lift` does with the leaves.
from . import _products as _products  # isort: skip
from . import _sum as _sum  # isort: skip
from . import _views as _views  # isort: skip
