{
  description = "Triton kernels for adapters in diffusion models";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    inputs:
    inputs.kernel-builder.lib.genKernelFlakeOutputs {
      inherit (inputs) self;
      path = ./.;
    };
}
