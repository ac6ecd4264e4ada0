"""Distillation: losses that teach one model what another knows. Student first, teacher second."""

from ._classes import dist as dist
from ._classes import dkd as dkd
from ._contrast import Bank as Bank
from ._contrast import crd as crd
from ._contrast import crd_bank as crd_bank
from ._contrast import crd_update as crd_update
from ._distances import l1 as l1
from ._distances import mse as mse
from ._features import attention_transfer as attention_transfer
from ._features import fsp as fsp
from ._features import hints as hints
from ._features import projection as projection
from ._features import similarity as similarity
from ._hard import hard as hard
from ._hard import mixed as mixed
from ._hard import sequence as sequence
from ._logits import js as js
from ._logits import kd as kd
from ._logits import reverse_kl as reverse_kl
from ._logits import standardized_kd as standardized_kd
from ._relations import relational as relational
