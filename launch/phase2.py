"""Phase 2: the localizer joins.

accelerate launch launch/phase2.py [--config demo] [--stage localize] [--from PATH]
    [--resume [auto] | --restart] [part.field=value …]
"""

if __name__ == "__main__":
    from rectvlm.train import main  # here, so that loader processes do not import the engine

    main(2)
