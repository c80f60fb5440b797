"""CM-CGNS pretraining of chest X-ray and report encoders on Ray and DeepSpeed."""

__version__ = "0.1.0"
