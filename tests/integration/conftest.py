from ray_fixture import local_ray
from s3_server import s3_environment, s3_server, s3_uri

__all__ = ["local_ray", "s3_environment", "s3_server", "s3_uri"]
