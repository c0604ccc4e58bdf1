"""The frozen base: loading, quantization, adapter sites, objective, sampling and export."""
