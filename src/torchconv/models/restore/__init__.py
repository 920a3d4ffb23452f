"""Networks that restore images: denoising, deblurring, super-resolution."""
