"""Machine code for what torch does slowly. Torch remains the reference, and does the work where there is no kernel."""
