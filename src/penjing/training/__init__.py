"""Training: the one loop, and what goes on around it."""

from penjing.training.augmentation import AUGMENTATIONS, augment
from penjing.training.checkpoint import Checkpoint, Watcher
from penjing.training.loop import AfterStep, Batch, call, train
from penjing.training.precision import PRECISIONS
from penjing.training.processes import count_processes, is_main_process, left_alone, wait_for_all
from penjing.training.schedules import SCHEDULES
from penjing.training.settings import OPTIMIZERS, Diverged, Monitor, Trained, Training
from penjing.training.trackers import TRACKERS, Tracking, require_trackers

__all__ = [
    "AUGMENTATIONS",
    "OPTIMIZERS",
    "PRECISIONS",
    "SCHEDULES",
    "TRACKERS",
    "AfterStep",
    "Batch",
    "Checkpoint",
    "Diverged",
    "Monitor",
    "Trained",
    "Tracking",
    "Training",
    "Watcher",
    "augment",
    "call",
    "count_processes",
    "is_main_process",
    "left_alone",
    "require_trackers",
    "train",
    "wait_for_all",
]
