"""One file a system. Each has `prepare(case) -> Round`: what is loaded once, and one timed round over all samples."""
