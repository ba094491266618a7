"""What Python is too slow for or cannot do, natively compiled, each with a plain Python twin of the same interface.

Callers import the public module and get whichever is there::

    from aoscore._speedups import chunker, frames, memory, sampler, unpack

=========  =================================================  ================  =================
public     what for                                           native            twin
=========  =================================================  ================  =================
unpack     unpack an image layer and compute both digests     ``_unpack.pyx``   ``_plain/unpack``
chunker    hash, copy and send files                          ``_chunker.pyx``  ``_plain/chunker``
frames     frames of MP's link, pieces of downloads in them   ``_frames.pyx``   ``_plain/frames``
sampler    read node and instance metrics                     ``_sampler.pyx``  ``_plain/sampler``
memory     give back pages that only start-up needed          ``_memory.pyx``   ``_plain/memory``, does nothing
=========  =================================================  ================  =================

``AOSCORE_PLAIN=1`` in the environment forces the twins; so does a package that was built without the native
modules. A native module that is there but cannot be loaded is an error. Nothing here imports another part of
aoscore, and this module imports nothing at all, so that a daemon loads only the hot paths it uses.

``_vchan.pyx`` has neither: it is a binding, and where its library is not there is no Xen.
"""
