"""Calibrated quantization: the array half (hessian, scales, solver) knows no model and no file."""
