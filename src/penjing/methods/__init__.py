"""The Steps, one file each. Importing this makes all of them known to recipes, which is why `penjing.Recipe` comes
from here.
"""

from penjing.methods.code_weights import CodeWeights
from penjing.methods.distill import Distill
from penjing.methods.equalize import Equalize
from penjing.methods.factorize import Factorize
from penjing.methods.finetune import Finetune
from penjing.methods.fuse_weights import FuseWeights
from penjing.methods.gradually import Gradually
from penjing.methods.merge_factors import MergeFactors
from penjing.methods.mix_precision import MixPrecision
from penjing.methods.prune_channels import PruneChannels
from penjing.methods.prune_heads import PruneHeads
from penjing.methods.prune_layers import PruneLayers
from penjing.methods.prune_weights import PruneWeights
from penjing.methods.quantize import Quantize
from penjing.methods.regularize import Regularize
from penjing.methods.search_amount import SearchAmount
from penjing.methods.share_weights import ShareWeights
from penjing.methods.train_low_entropy import TrainLowEntropy
from penjing.methods.train_quantized import TrainQuantized
from penjing.recipe import Plan, Recipe, Step

__all__ = [
    "CodeWeights",
    "Distill",
    "Equalize",
    "Factorize",
    "Finetune",
    "FuseWeights",
    "Gradually",
    "MergeFactors",
    "MixPrecision",
    "Plan",
    "PruneChannels",
    "PruneHeads",
    "PruneLayers",
    "PruneWeights",
    "Quantize",
    "Recipe",
    "Regularize",
    "SearchAmount",
    "ShareWeights",
    "Step",
    "TrainLowEntropy",
    "TrainQuantized",
]
