//! What can be changed over HTTP, by the parts that can do it.
//!
//! Owns nothing but the way from a request to the part that carries it out.

use std::sync::Arc;

use crate::admin::{FenceWish, OperationFuture, Operations, RatesWish};
use crate::downstream::Links;
use crate::relay::reload::Reloader;
use crate::upstream::FenceSwitch;

/// The operations of a relay.
pub(super) struct RelayOperations {
    pub(super) fence: FenceSwitch,
    pub(super) links: Arc<Links>,
    pub(super) reloader: Arc<Reloader>,
}

impl Operations for RelayOperations {
    fn set_fence(&self, wish: FenceWish) -> OperationFuture<'_> {
        Box::pin(async move {
            let outcome = match wish {
                FenceWish::Fence => self.fence.fence().await,
                FenceWish::Unfence => self.fence.unfence().await,
            };
            let told = outcome.map_err(|error| error.to_string())?;
            serde_json::to_value(told).map_err(|error| error.to_string())
        })
    }

    fn set_rates(&self, wish: RatesWish) -> OperationFuture<'_> {
        Box::pin(async move {
            let rates = self.links.change_rates(|rates| {
                if let Some(wanted) = wish.link_rate_max {
                    rates.link_rate_max = wanted.bytes();
                }
                if let Some(wanted) = wish.links_rate_max {
                    rates.links_rate_max = wanted.bytes();
                }
            });
            tracing::info!(?rates, "rates of compressed links changed");
            serde_json::to_value(self.links.status()).map_err(|error| error.to_string())
        })
    }

    fn reload(&self) -> OperationFuture<'_> {
        Box::pin(async move {
            let status = self.reloader.reload().await?;
            serde_json::to_value(status).map_err(|error| error.to_string())
        })
    }
}
