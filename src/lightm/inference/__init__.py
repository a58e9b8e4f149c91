"""Prediction: sliding windows, one case (`Predictor`), and whole folders (`predict_folder`)."""

from lightm.inference.folder import predict_folder
from lightm.inference.predictor import Predictor

__all__ = ["Predictor", "predict_folder"]
