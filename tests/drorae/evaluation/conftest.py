from evaluation_fakes import assets, context, encoder_config, outputs

__all__ = ["assets", "context", "encoder_config", "outputs"]
