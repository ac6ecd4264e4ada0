"""Data sets, embedded and local, as NumPy arrays; augmentation; a host pipeline."""

from jopt.data._augment import random_flip as random_flip
from jopt.data._augment import random_shift as random_shift
from jopt.data._cifar10 import CIFAR10_MEAN as CIFAR10_MEAN
from jopt.data._cifar10 import CIFAR10_STD as CIFAR10_STD
from jopt.data._cifar10 import cifar10 as cifar10
from jopt.data._dataset import Dataset as Dataset
from jopt.data._digits import digits as digits
from jopt.data._stream import Stream as Stream
from jopt.data._text import shakespeare as shakespeare
from jopt.data._text import text as text
from jopt.data._text import windows as windows
