"""More than one machine, with Ray: bulk jobs (`npu-proxy embed --ray`), Ray Data and Ray Serve. Needs npu-proxy[ray]."""

from npu_proxy.ray.dataset import embed_dataset
from npu_proxy.ray.serve import deployment

__all__ = ["deployment", "embed_dataset"]
