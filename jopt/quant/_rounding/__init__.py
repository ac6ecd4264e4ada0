"""Rounding layer by layer on data: GPTQ, AWQ, AdaRound, HQQ."""
