"""mpqc: the mixed-precision quantization compiler."""
