"""Training of HAN-DRL: labels by branch rollouts, warm start, discrete SAC."""
