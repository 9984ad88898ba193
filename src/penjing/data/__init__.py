"""Samples: from a Dataset, a DataLoader, an iterable of batches, arrays, or what a command line names."""

from penjing.data.batches import Data, concatenate
from penjing.data.loading import digits, load_data

__all__ = ["Data", "concatenate", "digits", "load_data"]
