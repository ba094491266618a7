# The digests of libcrypto that the hot paths use; all of them run without the interpreter lock.

cdef extern from "openssl/evp.h" nogil:
    ctypedef struct EVP_MD:
        pass
    ctypedef struct EVP_MD_CTX:
        pass
    ctypedef struct ENGINE:
        pass
    int EVP_MAX_MD_SIZE
    const EVP_MD *EVP_sha256()
    const EVP_MD *EVP_sha384()
    const EVP_MD *EVP_sha512()
    const EVP_MD *EVP_sha3_256()
    const EVP_MD *EVP_sha3_384()
    const EVP_MD *EVP_sha3_512()
    EVP_MD_CTX *EVP_MD_CTX_new()
    void EVP_MD_CTX_free(EVP_MD_CTX *context)
    int EVP_MD_CTX_copy_ex(EVP_MD_CTX *target, const EVP_MD_CTX *source)
    int EVP_DigestInit_ex(EVP_MD_CTX *context, const EVP_MD *kind, ENGINE *engine)
    int EVP_DigestUpdate(EVP_MD_CTX *context, const void *data, size_t size)
    int EVP_DigestFinal_ex(EVP_MD_CTX *context, unsigned char *digest, unsigned int *size)


cdef inline str finished_hex(const EVP_MD_CTX *context):
    """Hexadecimal digest of what went in so far; the running digest is not disturbed."""
    cdef unsigned char digest[64]
    cdef unsigned int size = 0
    cdef EVP_MD_CTX *copy = EVP_MD_CTX_new()
    try:
        if copy == NULL or not EVP_MD_CTX_copy_ex(copy, context) or not EVP_DigestFinal_ex(copy, digest, &size):
            raise MemoryError("libcrypto could not finish a digest")
        return (<bytes>digest[:size]).hex()
    finally:
        EVP_MD_CTX_free(copy)
