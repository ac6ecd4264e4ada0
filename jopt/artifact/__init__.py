"""A model as a folder: StableHLO for every platform, weights packed to their bits, a manifest."""

from ._load import Artifact as Artifact
from ._load import load as load
from ._manifest import ArtifactError as ArtifactError
from ._save import save as save
from ._save import weights_bytes as weights_bytes
