"""Phase 1: encoder and classifier.

accelerate launch launch/phase1.py [--config demo] [--resume | --restart] [part.field=value …]
"""

if __name__ == "__main__":
    from rectvlm.train import main  # here, so that loader processes do not import the engine

    main(1)
