"""Distillation: losses that teach one model what another knows. Student first, teacher second."""

from ._logits import kd as kd
