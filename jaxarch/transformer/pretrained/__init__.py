"""Published weights in and out: folders as the `transformers` library reads and writes them."""

from jaxarch.transformer.pretrained.folder import Pretrained, load_pretrained, save_pretrained

__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]
