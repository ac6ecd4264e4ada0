"""Layers that run fast on every backend, and the models that recipes train, in flax linen."""

from flax.linen import BatchNorm as BatchNorm

from jopt.nn._activations import Swish as Swish
from jopt.nn._convnet import ConvNet as ConvNet
from jopt.nn._convolution import Conv as Conv
from jopt.nn._convolution import conv as conv
from jopt.nn._fold import Folded as Folded
from jopt.nn._fold import fold_batch_norm as fold_batch_norm
from jopt.nn._pooling import max_pool as max_pool
from jopt.nn._resnet import ResNet as ResNet
from jopt.nn._simple_cnn import SimpleCNN as SimpleCNN
from jopt.nn._transformer import CharTransformer as CharTransformer
