"""The software of an AosEdge Unit: CM, SM, IAM and MP, and the tools around them."""

__version__ = "0.1.0"
