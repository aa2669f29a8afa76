"""Phase 3: the report generator joins: ZeRO-3 and a 4-bit language model.

accelerate launch launch/phase3.py [--config demo] [--stage align] [--from PATH]
    [--resume [auto] | --restart] [part.field=value …]
"""

if __name__ == "__main__":
    # Imported here, so that loader processes do not import the engine.
    from rectvlm.plan.auto_settings import resolve_auto_settings
    from rectvlm.train import main

    main(3, resolve_settings=resolve_auto_settings)
