from s3_server import s3_environment, s3_server, s3_uri

__all__ = ["s3_environment", "s3_server", "s3_uri"]
