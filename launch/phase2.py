"""Phase 2: the localizer joins.

accelerate launch launch/phase2.py [--config demo] [--stage localize|labels] [--from PATH]
    [--resume [auto] | --restart] [part.field=value …]
"""

if __name__ == "__main__":
    # Imported here, so that loader processes do not import the engine.
    from rectvlm.plan.auto_settings import resolve_auto_settings
    from rectvlm.train import main

    main(2, resolve_settings=resolve_auto_settings)
