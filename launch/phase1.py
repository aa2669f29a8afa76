"""Phase 1: encoder and classifier.

accelerate launch launch/phase1.py [--config demo] [--resume | --restart] [part.field=value …]
"""

if __name__ == "__main__":
    # Imported here, so that loader processes do not import the engine.
    from rectvlm.plan.auto_settings import resolve_auto_settings
    from rectvlm.train import main

    main(1, resolve_settings=resolve_auto_settings)
