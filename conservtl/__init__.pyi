# Written by tests/write_stub.py. Do not edit.
from conservtl.adaptation.adaptation import Adaptation as Adaptation
from conservtl.adaptation.prepare import adapt as adapt
from conservtl.engine.evaluation import Holdout as Holdout
from conservtl.engine.fit_result import FitResult as FitResult
from conservtl.engine.loop import fit as fit
from conservtl.engine.training import Training as Training
from conservtl.engine.trials import best_block as best_block
from conservtl.errors import ConservtlError as ConservtlError
from conservtl.errors import DataError as DataError
from conservtl.errors import InputError as InputError
from conservtl.errors import MemoryLimitError as MemoryLimitError
from conservtl.errors import MissingExtraError as MissingExtraError
from conservtl.errors import OmissionWarning as OmissionWarning
from conservtl.errors import PlanError as PlanError
from conservtl.errors import SelectorError as SelectorError
from conservtl.errors import SourceError as SourceError
from conservtl.errors import SpecError as SpecError
from conservtl.errors import TrainingDivergedError as TrainingDivergedError
from conservtl.experiments.advice.lr_range_test import lr_find as lr_find
from conservtl.experiments.advice.range_curve import RangeTest as RangeTest
from conservtl.experiments.advice.recommendation import Recommendation as Recommendation
from conservtl.experiments.advice.recommendation import recommend as recommend
from conservtl.experiments.own.gains import Gains as Gains
from conservtl.experiments.own.gains import evaluate as evaluate
from conservtl.experiments.own.studies import compare as compare
from conservtl.experiments.own.studies import sweep as sweep
from conservtl.experiments.publishing.save import save as save
from conservtl.experiments.results import Comparison as Comparison
from conservtl.experiments.results import Sweep as Sweep
from conservtl.experiments.run.adapted import Adapted as Adapted
from conservtl.experiments.run.bundle import load_adapted as load
from conservtl.experiments.run.bundle import load_adapted as load_adapted
from conservtl.experiments.spec.recipes import Recipe as Recipe
from conservtl.experiments.spec.recipes import recipe as recipe
from conservtl.layers.find import find_layers as find_layers
from conservtl.layers.info import Layer as Layer
from conservtl.methods.auto_rgn import AutoRGN as AutoRGN
from conservtl.methods.base import Strategy as Strategy
from conservtl.methods.discriminative_lr import DiscriminativeLR as DiscriminativeLR
from conservtl.methods.entropy_minimisation import EntropyMinimisation as EntropyMinimisation
from conservtl.methods.feature_conservation.strategy import FeatureConservation as FeatureConservation
from conservtl.methods.feature_extraction.strategy import FeatureExtraction as FeatureExtraction
from conservtl.methods.fisher_sp import FisherSP as FisherSP
from conservtl.methods.gradual_unfreezing import GradualUnfreezing as GradualUnfreezing
from conservtl.methods.gradual_unfreezing import Stage as Stage
from conservtl.methods.group_lasso_sp import GroupLassoSP as GroupLassoSP
from conservtl.methods.input_transform.strategy import InputTransform as InputTransform
from conservtl.methods.l1_sp import L1SP as L1SP
from conservtl.methods.l2_sp import L2SP as L2SP
from conservtl.methods.layer_transfer import LayerTransfer as LayerTransfer
from conservtl.methods.lhuc.strategy import LHUC as LHUC
from conservtl.methods.lora.strategy import LoRA as LoRA
from conservtl.methods.lp_ft import LPFT as LPFT
from conservtl.methods.mixout import Mixout as Mixout
from conservtl.methods.norm_adaptation.strategy import NormAdaptation as NormAdaptation
from conservtl.methods.output_conservation.strategy import OutputConservation as OutputConservation
from conservtl.methods.projection import Projection as Projection
from conservtl.methods.selective_decay import SelectiveDecay as SelectiveDecay
from conservtl.methods.spectral_shrinkage import SpectralShrinkage as SpectralShrinkage
from conservtl.methods.surgical_fine_tuning import SurgicalFineTuning as SurgicalFineTuning
from conservtl.methods.weight_interpolation import WeightInterpolation as WeightInterpolation
from conservtl.plan.plan import Plan as Plan
from conservtl.plan.row import Anneal as Anneal
from conservtl.plan.row import Phase as Phase
from conservtl.plan.row import Row as Row
from conservtl.source.itself import itself as itself
from conservtl.source.transfer import TransferReport as TransferReport
from conservtl.tasks.prediction import Prediction as Prediction
from conservtl.weights.interpolation import interpolate as interpolate
from conservtl.weights.interpolation import interpolation_path as interpolation_path
from conservtl.weights.interpolation import interpolation_path as path
from conservtl.weights.merge import Merged as Merged
from conservtl.weights.merge import merge as merge
from conservtl.weights.recompute_bn import recompute_statistics as recompute_statistics
from conservtl.weights.soup import soup as soup

__version__: str
__all__ = [
    "L1SP",
    "L2SP",
    "LHUC",
    "LPFT",
    "Adaptation",
    "Adapted",
    "Anneal",
    "AutoRGN",
    "Comparison",
    "ConservtlError",
    "DataError",
    "DiscriminativeLR",
    "EntropyMinimisation",
    "FeatureConservation",
    "FeatureExtraction",
    "FisherSP",
    "FitResult",
    "Gains",
    "GradualUnfreezing",
    "GroupLassoSP",
    "Holdout",
    "InputError",
    "InputTransform",
    "Layer",
    "LayerTransfer",
    "LoRA",
    "MemoryLimitError",
    "Merged",
    "MissingExtraError",
    "Mixout",
    "NormAdaptation",
    "OmissionWarning",
    "OutputConservation",
    "Phase",
    "Plan",
    "PlanError",
    "Prediction",
    "Projection",
    "RangeTest",
    "Recipe",
    "Recommendation",
    "Row",
    "SelectiveDecay",
    "SelectorError",
    "SourceError",
    "SpecError",
    "SpectralShrinkage",
    "Stage",
    "Strategy",
    "SurgicalFineTuning",
    "Sweep",
    "Training",
    "TrainingDivergedError",
    "TransferReport",
    "WeightInterpolation",
    "adapt",
    "best_block",
    "compare",
    "evaluate",
    "find_layers",
    "fit",
    "interpolate",
    "interpolation_path",
    "itself",
    "load_adapted",
    "lr_find",
    "merge",
    "recipe",
    "recommend",
    "recompute_statistics",
    "save",
    "soup",
    "sweep",
]
