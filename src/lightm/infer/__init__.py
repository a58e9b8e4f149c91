"""Prediction: sliding windows, one case (`Predictor`), and whole folders (`predict_folder`)."""

from lightm.infer.folder import predict_folder
from lightm.infer.predictor import Predictor

__all__ = ["Predictor", "predict_folder"]
