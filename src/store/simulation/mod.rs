//! stub
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mutant {
    #[default]
    None,
    AcknowledgeBeforeSync,
    NoDirectorySync,
    TrustLength,
    NoRewrite,
}
