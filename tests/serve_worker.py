"""transformers' own OpenAI-compatible server, with a Hugging Face directory: python -m tests.serve_worker DIR PORT."""

import io
import sys

from tests import conftest  # noqa: F401 - torchvision imports beside any build of torch

if __name__ == "__main__":
    import numpy as np
    import torch
    import torchvision.io
    from PIL import Image
    from transformers.cli.transformers import main

    theirs = torchvision.io.decode_image

    def decode_image(data, *arguments, **options):
        """torchvision's decoder, or Pillow's where torchvision was built for another torch and its own is missing."""
        try:
            return theirs(data, *arguments, **options)
        except RuntimeError:
            image = Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    torchvision.io.decode_image = decode_image
    directory, port = sys.argv[1:]
    sys.argv = ["transformers", "serve", directory, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    sys.argv += ["--port", port]
    main()
