"""Matrix products over quantized weights. Import the submodules; nothing is re-exported."""
